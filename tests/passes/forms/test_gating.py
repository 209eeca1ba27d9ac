"""Gates over inputs, against the published rules in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import recast
from recast.passes.calibration import Calibration
from recast.passes.errors_of import predicted_errors
from recast.passes.forms import Form, Stats
from recast.passes.forms.gated import Gated, gates, ungated
from recast.passes.forms.stats import SIZES
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(tokens: int, n: int) -> Tensor:
    return drawn(tokens, n, seed=n) * torch.logspace(-1, 1, n, dtype=torch.float64)


def fitted(text: str, weight: Tensor, stats: Stats | None = None) -> Gated:
    operator = Form.parse(text).fit(weight, stats)
    assert isinstance(operator, Gated)
    return operator


def by_rank(x: np.ndarray, weight: np.ndarray, share: float, weighted: bool) -> np.ndarray:
    """Each token by itself, in numpy: sort the scores, keep the columns of the first."""
    kept = max(1, x.shape[1] - math.floor(share * x.shape[1] + 0.5))
    norms = np.sqrt((weight**2).sum(0)) if weighted else np.ones(x.shape[1])
    found = np.zeros((len(x), len(weight)))
    for token, vector in enumerate(x):
        chosen = np.argsort(-np.abs(vector) * norms, kind="stable")[:kept]
        found[token] = weight[:, chosen] @ vector[chosen]
    return found


@pytest.mark.parametrize("shape", [(63, 60), (60, 63), (1, 37), (5, 1), (24, 48)], ids=str)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.65, 0.97])
@pytest.mark.parametrize("name", ["wina", "teal"])
def test_product_of_the_kept_columns(name: str, share: float, shape: tuple[int, int]) -> None:
    weight = drawn(*shape) * torch.logspace(1, -1, shape[1], dtype=torch.float64)
    x = uneven(7, shape[1])
    expected = by_rank(x.numpy(), weight.numpy(), share, name == "wina")
    operator = fitted(f"{name}({share})", weight)
    assert_close(operator.apply(x), torch.from_numpy(expected), terms=shape[1])
    # One token, tokens in two dimensions, and float32.
    assert_close(operator.apply(x[0]), torch.from_numpy(expected[0]), terms=shape[1])
    small = fitted(f"{name}({share})", weight.float()).apply(x.float().reshape(1, 7, -1))
    assert_close(small[0], torch.from_numpy(expected), terms=shape[1])


@pytest.mark.parametrize("name", ["wina", "teal"])
def test_columns_and_inputs_that_are_zero(name: str) -> None:
    weight, x = drawn(9, 20), drawn(6, 20, seed=1)
    weight[:, ::3] = 0
    x[:, 1::2] = 0
    x[3] = 0
    operator = fitted(f"{name}(0.5)", weight)
    assert_close(operator.apply(x), torch.from_numpy(by_rank(x.numpy(), weight.numpy(), 0.5, name == "wina")), terms=20)
    assert not operator.apply(x)[3].any()
    if name == "wina":
        # Only columns that are zero are left out: there are 3 + 7 of them where 10 inputs are to be.
        assert_close(operator.apply(x), x @ weight.T, terms=20)


@pytest.mark.parametrize("name", ["wina", "teal"])
def test_bfloat16(name: str) -> None:
    weight, x = drawn(30, 44).bfloat16(), uneven(5, 44).bfloat16()
    found = fitted(f"{name}(0.5)", weight).apply(x)
    assert found.dtype == torch.bfloat16
    kept = by_rank(x.double().numpy(), weight.double().numpy(), 0.5, name == "wina")
    # Two scores that the rounded numbers make equal both count; none are here.
    assert_close(found, torch.from_numpy(kept), terms=44)


def test_inputs_that_tie_all_count() -> None:
    operator = fitted("teal(0.5)", torch.eye(4))
    assert operator.mask(torch.tensor([[3.0, -2.0, 2.0, 1.0]])).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_threshold_is_the_quantile_of_all_inputs(share: float) -> None:
    x = uneven(1001, 33)
    weight = drawn(8, 33)
    exact = float(np.quantile(np.abs(x.numpy()), share))
    operator = fitted(f"teal({share})", weight, Stats.from_inputs(x))
    assert operator.threshold is not None
    assert exact / 1.022 <= operator.threshold <= exact * 1.022
    left_out = float((np.abs(x.numpy()) <= operator.threshold).mean())
    assert abs(left_out - share) < 0.01
    assert_close(operator.apply(x), (x * (x.abs() > operator.threshold)) @ weight.T, terms=33)
    # From the sample alone it is exact.
    stats = Stats.from_inputs(x, sample=2000)
    sampled = Stats(stats.gram, stats.mean, stats.absmax, stats.tokens, stats.sample)
    found = fitted(f"teal({share})", weight, sampled).threshold
    assert found is not None
    assert math.isclose(found, np.quantile(np.abs(x.numpy()), share, method="inverted_cdf"), rel_tol=1e-6)


def test_threshold_where_most_inputs_are_zero() -> None:
    x = drawn(50, 12).clamp_min(0)
    operator = fitted("teal(0.4)", drawn(3, 12), Stats.from_inputs(x))
    assert operator.threshold == 0
    assert_close(operator.apply(x), x @ operator.to_dense().T, terms=12)


def test_weighing_by_norms_loses_less() -> None:
    weight = drawn(50, 64) * torch.logspace(1, -1, 64, dtype=torch.float64)
    x = drawn(200, 64, seed=2)
    wanted = x @ weight.T
    wina, teal = ((fitted(f"{name}(0.5)", weight).apply(x) - wanted).norm() for name in ("wina", "teal"))
    assert wina < 0.5 * teal
    # With orthogonal columns what is lost is exactly the squares of the scores left out.
    weight = torch.linalg.qr(drawn(50, 40))[0] * torch.logspace(0, -1, 40, dtype=torch.float64)
    x = drawn(30, 40, seed=3)
    lost = (fitted("wina(0.5)", weight).apply(x) - x @ weight.T).square().sum(1)
    scores = np.sort(np.abs(x.numpy()) * np.linalg.norm(weight.numpy(), axis=0), 1)
    assert_close(lost, torch.from_numpy((scores[:, :20] ** 2).sum(1)), terms=40)


@pytest.mark.parametrize("text", ["wina(0.5)", "teal(0.5)", "wina(0.8) | int4", "low_rank(20) | wina(0.4)"])
def test_expected_error_without_a_sample(text: str) -> None:
    # Independent normal inputs of unequal size: the estimate from the Gram matrix is the error that is then measured.
    weight, x = drawn(40, 48), uneven(4000, 48)
    stats = Stats.from_inputs(x)
    operator = Form.parse(text).fit(weight, stats)
    assert gates(operator)
    wanted = x @ weight.T
    measured = float((operator.apply(x) - wanted).norm() / wanted.norm())
    predicted = predicted_errors(weight, operator, stats)[1]
    assert predicted is not None
    assert 0.85 < predicted / measured < 1.15


def test_expected_error_without_statistics() -> None:
    weight, x = drawn(40, 64), drawn(2000, 64, seed=5)
    operator = fitted("wina(0.5)", weight)
    wanted = x @ weight.T
    measured = float((operator.apply(x) - wanted).norm() / wanted.norm())
    plain, predicted = predicted_errors(weight, operator, None)
    assert plain == 0
    assert predicted is not None
    assert 0.9 < predicted / measured < 1.1


def test_refitted_weights_bring_their_own_norms() -> None:
    operator = fitted("wina(0.5) | int2", drawn(16, 64).float())
    assert operator.norms is not None
    assert operator.children()["weight"].kind == "quantized"
    assert_close(operator.norms, operator.to_dense().norm(dim=0))
    x = drawn(3, 64).float()
    dense = operator.to_dense().double().numpy()
    assert_close(operator.apply(x), torch.from_numpy(by_rank(x.double().numpy(), dense, 0.5, True)), terms=64)


def test_cost_counts_the_union_of_what_tokens_want() -> None:
    m, n = 96, 64
    operator = fitted("wina(0.75)", torch.randn(m, n))
    for tokens in (1, 2, 16):
        cost = operator.cost(tokens)
        columns = n * (1 - 0.75**tokens)
        assert cost.bytes == math.ceil(m * 4 * columns) + 4 * n + tokens * (m + n) * 4
        assert cost.flops == tokens * (2 * m * 16 + 2 * n)
    assert fitted("teal(0.75)", torch.randn(m, n)).cost(1).bytes == m * 4 * 16 + (m + n) * 4


def test_shares_that_leave_nothing_or_nothing_out() -> None:
    for share in ("0.0", "1.0", "-0.5"):
        with pytest.raises(FormError, match=r"wina: sparsity is .*0\.5 would work"):
            Form.parse(f"wina({share})")
    assert fitted("wina(0.999)", drawn(3, 5)).kept == 1


def test_sizes_are_counted_while_data_streams_and_kept_in_files(tmp_path: Path) -> None:
    program = recast.capture(nn.Sequential(nn.Linear(12, 4)).eval(), (torch.randn(3, 12),))
    batches = [torch.randn(tokens, 12) * 10**tokens for tokens in (1, 5, 2)]
    calibration = recast.calibrate(program, batches)
    sizes = calibration["0"].sizes
    assert sizes is not None
    at_once = Stats.from_inputs(torch.cat(batches)).sizes
    assert at_once is not None
    assert torch.equal(sizes, at_once)
    assert sizes.shape == (SIZES,)
    assert int(sizes.sum()) == 8 * 12
    calibration.save(tmp_path / "new")
    again = Calibration.load(tmp_path / "new")["0"]
    assert again.sizes is not None
    assert torch.equal(again.sizes, sizes)
    assert again.hash == calibration["0"].hash
    # A file from before there were sizes is read, and its sample gives the threshold.
    with safe_open(tmp_path / "new", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.endswith("/sizes")}  # noqa: SIM118
        save_file(tensors, tmp_path / "old", metadata=file.metadata())
    old = Calibration.load(tmp_path / "old")["0"]
    assert old.sizes is None
    assert old.size_at(0.5) == pytest.approx(again.size_at(0.5), rel=0.2)


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_from_the_plan_to_a_target(target: str) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(63, 60), nn.GELU(), nn.Linear(60, 77), nn.GELU(), nn.Linear(77, 21)).eval()
    program = recast.capture(model, (torch.randn(4, 5, 63),))
    calibration = recast.calibrate(program, [torch.randn(40, 5, 63)])
    forms = {"0": "wina(0.5)", "2": "teal(0.4)", "4": "wina(0.5) | int8"}
    recipe = {"rules": [{"match": name, "form": form} for name, form in forms.items()]}
    plan = recast.plan(program, recipe, calibration)
    assert {name: str(entry.form).split("(")[0] for name, entry in plan.entries.items()} == {
        "0": "wina",
        "2": "teal",
        "4": "wina",
    }
    assert all(0.02 < entry.predicted_error < 0.5 for entry in plan.entries.values())
    rewritten = recast.rewrite(program, plan, calibration=calibration)
    artifact = recast.lower(rewritten, target)
    with torch.no_grad():
        for tokens in (5, 1, 9):
            x = torch.randn(3, tokens, 63)
            # The eager program with all operators, and the rule by hand on the first of them.
            assert_close(artifact(x), rewritten(x), terms=16 * 77)


def test_without_its_gates_an_operator_is_its_matrix() -> None:
    operator = Form.parse("(wina(0.5) + low_rank(2)) | int8").fit(torch.randn(20, 24))
    plain = ungated(operator)
    assert gates(operator)
    assert not gates(plain)
    x = torch.randn(4, 24)
    assert_close(plain.apply(x), x @ operator.to_dense().T, terms=48)
