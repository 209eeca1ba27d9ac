"""Calibration behind a rewritten prefix, against the mathematics written out with the model's own layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.forms import Form, Stats
from recast.patterns.errors import CalibrationError
from tests.helpers import assert_close

FORM = "low_rank(5)"


class Twice(nn.Module):
    """Two products behind one, a packed one and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.packed, self.last = nn.Linear(12, 20), nn.Linear(20, 36, bias=False), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        a, b, c = self.packed(hidden).chunk(3, -1)
        return self.last(a * torch.sigmoid(b) + c) + x


@pytest.fixture
def model() -> Twice:
    torch.manual_seed(0)
    return Twice().double().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(count, 7, 12, dtype=torch.float64) for count in (9, 5)]


def rank(weight: np.ndarray, gram: np.ndarray, kept: int) -> np.ndarray:
    """The best weight of a rank under a Gram matrix, by a Cholesky factor."""
    root = np.linalg.cholesky(gram)
    u, s, v = np.linalg.svd(weight @ root)
    found: np.ndarray = (u[:, :kept] * s[:kept]) @ v[:kept] @ np.linalg.inv(root)
    return found


def aimed(weight: np.ndarray, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a fit behind a prefix comes near to, and under which Gram matrix; inputs are rows."""
    gram, cross = after.T @ after, before.T @ after
    eye = 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    return weight @ (cross + eye) @ np.linalg.inv(gram + eye), gram


def test_each_fit_sees_what_the_fits_before_it_give(model: Twice, batches: list[Tensor]) -> None:
    program, cache = recast.capture(model, (batches[0],)), OperatorCache(None)
    found = recast.calibrate(program, batches, recipe=FORM, cache=cache, progress=False)
    plan = recast.plan(program, FORM, found, cache=cache, progress=False)
    rewritten = recast.rewrite(program, plan, cache=cache, pictures=False, measure=False)

    x = torch.cat(batches).reshape(-1, 12).numpy()
    first, packed, last = (layer.weight.detach().numpy() for layer in (model.first, model.packed, model.last))
    bias, end = model.first.bias.detach().numpy(), model.last.bias.detach().numpy()
    low_first = rank(first, x.T @ x, 5)
    before, after = np.tanh(x @ first.T + bias), np.tanh(x @ low_first.T + bias)
    low_packed = rank(*aimed(packed, before, after), 5)

    def joined(hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
        a, b, c = np.split(hidden @ weight.T, 3, -1)
        result: np.ndarray = a / (1 + np.exp(-b)) + c
        return result

    one, other = joined(before, packed), joined(after, low_packed)
    expected = other @ rank(*aimed(last, one, other), 5).T + end + x
    got = torch.cat([rewritten(batch).reshape(-1, 12) for batch in batches])
    assert_close(got, torch.from_numpy(expected), terms=12 * 20 * 36 * 7)
    # Every fit was made once: the plan and the rewriting take what calibration fitted.
    assert cache.fits == 3


def test_the_output_is_nearer_than_without(model: Twice, batches: list[Tensor]) -> None:
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(6)]).double().eval()
    x = torch.randn(400, 24, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1, 24, dtype=torch.float64))
    program, errors = recast.capture(deep, (x[:9],)), []
    for recipe in (None, "low_rank(8)"):
        cache = OperatorCache(None)
        known = recast.calibrate(program, [x], recipe=recipe, cache=cache, progress=False)
        plan = recast.plan(program, "low_rank(8)", known, cache=cache, progress=False)
        changed = recast.rewrite(program, plan, cache=cache, pictures=False, measure=False)
        with torch.no_grad():
            errors.append(float((changed(x) - program(x)).norm()))
    assert errors[1] < 0.98 * errors[0]


def test_sites_that_stay_dense_change_nothing(model: Twice, batches: list[Tensor]) -> None:
    program = recast.capture(model, (batches[0],))
    plain = recast.calibrate(program, batches, progress=False)
    found = recast.calibrate(
        program, batches, recipe={"rules": [{"match": "last", "form": FORM}]}, cache=OperatorCache(None)
    )
    assert found.hash == plain.hash
    assert all(stats.cross is None for stats in found.groups.values())


def test_parts_are_fitted_for_themselves(model: Twice, batches: list[Tensor]) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(x.shape))

    torch.manual_seed(0)
    packed = Packed().eval()
    x = torch.randn(6, 5, 16)
    recipe = {"rules": [{"match": "qkv.v", "form": "low_rank(2)"}, {"match": "out", "form": "low_rank(4)"}]}
    program, cache = recast.capture(packed, (x,)), OperatorCache(None)
    found = recast.calibrate(program, [x], recipe=recipe, cache=cache, progress=False)
    assert found["out"].cross is not None
    with torch.no_grad():
        low = Form.parse("low_rank(2)").fit(packed.qkv.weight[32:], found["qkv"]).to_dense()
        q, k, v = nn.functional.linear(x, torch.cat([packed.qkv.weight[:32], low]), packed.qkv.bias).chunk(3, -1)
        heads = [t.reshape(6, 5, 2, 8).transpose(1, 2) for t in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(30, 16).double()
    gram = found["out"].gram
    assert gram is not None
    assert_close(gram.float(), (mixed.T @ mixed).float(), terms=16 * 30)


def test_saved_and_loaded_and_held_to_its_recipe(model: Twice, batches: list[Tensor], tmp_path: Path) -> None:
    program = recast.capture(model, (batches[0],))
    found = recast.calibrate(program, batches, recipe=FORM, cache=OperatorCache(None), progress=False)
    found.save(tmp_path / "statistics.safetensors")
    again = recast.Calibration.load(tmp_path / "statistics.safetensors")
    assert again.hash == found.hash
    assert again.behind == found.behind != ""
    assert again.hash != recast.calibrate(program, batches, progress=False).hash
    with pytest.raises(CalibrationError, match=r"gathered behind sites rewritten by recipe .* this is recipe"):
        recast.plan(program, "low_rank(4)", again, cache=OperatorCache(None), progress=False)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"default": FORM, "budget": 0.5, "candidates": ["int8"]}, "without a budget"),
        ("shared_basis(4)", "is shared between sites"),
        ({"rules": [{"match": "*", "form": "nystrom(ratio=0.5)"}]}, "a form of a whole block"),
    ],
)
def test_what_cannot_go_in_order_is_refused(model: Twice, batches: list[Tensor], recipe: object, message: str) -> None:
    program = recast.capture(model, (batches[0],))
    with pytest.raises(CalibrationError, match=message):
        recast.calibrate(program, batches, recipe=recipe, cache=OperatorCache(None), progress=False)


def test_few_tokens_and_none_aim_at_the_weight() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    plain = Stats.from_inputs(x)
    import dataclasses

    same = dataclasses.replace(plain, cross=plain.gram)
    weight = torch.randn(4, 8, dtype=torch.float64)
    assert_close(same.regular.aimed(weight), weight, terms=64)
    nothing = dataclasses.replace(Stats.from_inputs(torch.zeros(3, 8)), cross=torch.zeros(8, 8, dtype=torch.float64))
    assert nothing.aimed(weight) is weight
