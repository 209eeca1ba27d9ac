"""Scales of AWQ and SmoothQuant folded into what makes the input: bit for bit the same, and refused where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes import rewrite as rewriting
from recast.passes.base import Context, Pipeline
from recast.passes.cache import OperatorCache
from recast.passes.exact import Note
from recast.passes.forms import Form, Operator, Product, Quantized, Stats, Sum
from recast.passes.forms.diagonal import Diagonal
from recast.passes.module import OperatorModule
from recast.passes.rules.fold_input_scale import FoldInputScale
from recast.patterns.errors import PlanError
from tests.exact import randomise
from tests.helpers import assert_close

AWQ = "awq('int4(group=8)', shared=true, grid=6)"
FORMS = [AWQ, "smoothquant(shared=true)"]
WIDTH = 24


def uneven(*shape: int) -> Tensor:
    """Inputs some of whose features are much larger than others."""
    return torch.randn(*shape) * torch.logspace(-1, 1.5, shape[-1])[torch.randperm(shape[-1])]


class WrittenOut(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y * (self.weight + self.offset) if self.offset else self.weight * y


class Block(nn.Module):
    """A gated block behind a norm; `kept` also gives the norm's value back."""

    def __init__(self, norm: nn.Module, kept: bool = False) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept
        self.gate, self.up = nn.Linear(WIDTH, 40, bias=False), nn.Linear(WIDTH, 40)
        self.down = nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Any:
        n = self.norm(x)
        y = x + self.down(torch.nn.functional.silu(self.gate(n)) * self.up(n))
        return (y, n) if self.kept else y


class Attention(nn.Module):
    """`share` query heads read each head of keys and values; `packed` makes all three in one product."""

    def __init__(self, heads: int = 4, share: int = 1, packed: bool = False) -> None:
        super().__init__()
        self.heads, self.share, self.packed = heads, share, packed
        self.size = WIDTH // heads
        few = WIDTH // share
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, few), nn.Linear(WIDTH, few)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(WIDTH, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        if self.share > 1:
            k, v = (part[:, :, None].expand(-1, -1, self.share, -1, -1).flatten(1, 2) for part in (k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.o(y.transpose(1, 2).flatten(-2))
        return result


def rewritten(
    model: nn.Module, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[recast.Program, recast.Program, Note]:
    """The program with forms applied, the same with scales folded, and what the fold noted."""
    x = uneven(2, 5, WIDTH)
    captured = recast.capture(model.float().eval(), (x,))
    calibration = recast.calibrate(captured, [uneven(3, 40, WIDTH) for _ in range(3)], progress=False)
    cache = OperatorCache(None)
    plan = recast.plan(captured, {"default": recipe, "allow_larger": True}, calibration, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "pipeline_for", lambda _: Pipeline.parse("raise_sites,apply_forms"))
        before = recast.rewrite(captured, plan, cache=cache, pictures=False)
    context = Context(plan, calibration, cache)
    FoldInputScale().run(before, context)
    after = recast.rewrite(captured, plan, cache=cache, pictures=False)
    for length in (1, 5, 24):
        given = uneven(3, length, WIDTH)
        with torch.no_grad():
            pairs = zip(*(torch.utils._pytree.tree_leaves(p(given)) for p in (before, after)), strict=True)
            # Powers of two change no bit.
            assert all(torch.equal(a, b) for a, b in pairs)
    note = context.notes["fold_input_scale"]
    assert isinstance(note, Note)
    return before, after, note


def operator(program: recast.Program, site: str) -> Operator:
    for node in program.graph.find_nodes(op="call_module"):
        module = program.module.get_submodule(str(node.target))
        if isinstance(module, OperatorModule) and module.site == site:
            return module.operator
    raise AssertionError(f"no operator for {site}")


def scale_of(program: recast.Program, site: str) -> Tensor:
    found = operator(program, site)
    assert isinstance(found, Product)
    assert isinstance(found.right, Diagonal)
    return found.right.values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), WrittenOut(0.0), WrittenOut(1.0)], ids=["ln", "rms", "out", "less"]
)
def test_into_a_norm_and_through_a_product(norm: nn.Module, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Block(copy.deepcopy(norm)))
    with torch.no_grad():
        model.norm.weight.mul_(torch.logspace(-1, 1.5, WIDTH, dtype=torch.float64)[torch.randperm(WIDTH)])
    before, after, note = rewritten(model, form, monkeypatch)
    assert sorted(note.done) == ["down -> up", "gate, up -> norm.weight"]
    scale, inner = scale_of(before, "gate"), scale_of(before, "down")
    assert torch.equal(scale_of(before, "up"), scale)
    assert len(set(scale.tolist())) > 1
    assert all(isinstance(operator(after, site), Quantized) for site in ("gate", "up", "down"))
    offset = getattr(norm, "offset", 0.0)  # what was added to the weight is in it now
    old, new = (program.weights["norm.weight"].detach().double().numpy() for program in (before, after))
    assert_close(torch.from_numpy(new).float(), torch.from_numpy((old + offset) * scale.double().numpy()).float())
    if isinstance(norm, nn.LayerNorm):
        assert torch.equal(after.weights["norm.bias"], before.weights["norm.bias"] * scale)
    assert torch.equal(after.weights["up.bias"], before.weights["up.bias"] * inner)
    assert "norm.weight" in after.originals_of("norm.weight")
    assert after.nbytes() == before.nbytes() - 4 * (2 * WIDTH + 40)


@pytest.mark.parametrize("packed", [False, True])
def test_through_an_attention_into_the_values(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Attention(packed=packed))
    with torch.no_grad():
        rows = (model.qkv if packed else model.v).weight[-WIDTH:]
        rows.mul_(torch.logspace(-1, 1.5, WIDTH, dtype=torch.float64)[torch.randperm(WIDTH)].unsqueeze(1))
    before, after, note = rewritten(model, AWQ, monkeypatch)
    assert note.done == [f"o -> {'qkv' if packed else 'v'}"]
    scale = scale_of(before, "o").double().numpy()
    assert len(set(scale.tolist())) > 1
    site = "qkv" if packed else "v"
    factors = np.concatenate([np.ones(2 * WIDTH), scale]) if packed else scale
    expected = operator(before, site).to_dense().double().numpy() * factors[:, None]
    assert np.array_equal(operator(after, site).to_dense().double().numpy(), expected)
    # What all three read is an input of the model, which has no scale to change.
    assert any("has no scale" in refused.reason for refused in note.refused)


def test_heads_that_share_values_need_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Attention(share=2))
    with torch.no_grad():
        # Of the two heads that read the same values one takes the mean, which is small, the other single ones.
        model.q.weight[:6], model.q.bias[:6] = 0, 0
        model.q.weight[6:] *= 100
        model.v.weight.mul_(torch.logspace(-1, 1.5, 12, dtype=torch.float64)[torch.randperm(12)].unsqueeze(1))
    _, after, note = rewritten(model, AWQ, monkeypatch)
    assert not note.done
    assert any("heads that share values have other scales" in refused.reason for refused in note.refused)
    assert isinstance(operator(after, "o"), Product)


def test_into_a_dense_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(nn.Sequential(nn.Linear(WIDTH, 30), nn.Linear(30, 16)))
    before, after, note = rewritten(model, AWQ, monkeypatch)
    assert note.done == ["1 -> 0"]
    x = uneven(2, 5, WIDTH)
    captured = recast.capture(model, (x,))
    calibration = recast.calibrate(captured, [uneven(3, 40, WIDTH)], progress=False)
    recipe = {"rules": [{"match": "1", "form": AWQ}], "allow_larger": True}
    plan = recast.plan(captured, recipe, calibration, cache=OperatorCache(None))
    after = recast.rewrite(captured, plan, cache=OperatorCache(None), pictures=False)
    assert after.report is not None
    assert after.report.passes["fold_input_scale"]["done"] == ["1 -> 0"]
    # The rows of the dense matrix hold what the inputs of the second were divided by.
    ratio = after.weights["0.weight"] / model[0].weight  # type: ignore[operator]
    assert torch.equal(ratio, ratio[:, :1].expand_as(ratio))
    assert torch.equal(after.weights["0.bias"], model[0].bias * ratio[:, 0])
    assert before.weights.keys() == {"0.bias", "1.bias"}


@pytest.mark.parametrize(
    ("model", "form", "reason"),
    [
        (Block(nn.LayerNorm(WIDTH), kept=True), AWQ, "gives it back as a result"),
        (Block(nn.LayerNorm(WIDTH, elementwise_affine=False)), AWQ, "'layer_norm' has no scale"),
        (Block(nn.LayerNorm(WIDTH)), "awq('int3(group=8)', grid=9)", "another scale; with shared=true"),
        (Block(nn.LayerNorm(WIDTH)), "smoothquant", "which a scale that is no power of two would change"),
        (nn.Sequential(nn.Linear(WIDTH, 30), nn.GELU(), nn.Linear(30, 16)), AWQ, "'gelu' makes it"),
        (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)), "", ""),
    ],
)
def test_places_that_are_not_touched(model: nn.Module, form: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not form:  # one linear used twice, behind two different values
        linear = model[1]  # type: ignore[index]
        model, form, reason = nn.Sequential(model[0], linear, nn.Tanh(), linear), AWQ, "reads something else"  # type: ignore[index]
    _, _, note = rewritten(randomise(model), form, monkeypatch)
    assert any(reason in refused.reason for refused in note.refused), [refused.reason for refused in note.refused]


def test_a_value_times_itself_keeps_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, 30), nn.Linear(30, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            result: Tensor = self.second(y * y)
            return result

    _, after, note = rewritten(randomise(Squared()), AWQ, monkeypatch)
    assert not note.done
    assert isinstance(operator(after, "second"), Product)


@pytest.mark.parametrize("target", ["eager", "onnx"])
def test_folded_programs_are_lowered_and_saved(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    _, after, _ = rewritten(randomise(Block(nn.LayerNorm(WIDTH))), AWQ, monkeypatch)
    artifact = recast.lower(after, target)
    artifact.save(tmp_path / "saved")
    x = uneven(3, 7, WIDTH)
    with torch.no_grad():
        assert_close(artifact(x), after(x), terms=16 * WIDTH)
        assert_close(recast.load(tmp_path / "saved")(x), after(x), terms=16 * WIDTH)


def test_one_scale_is_the_best_power_for_all_that_read_an_input() -> None:
    x = uneven(300, WIDTH)
    weights = [torch.randn(rows, WIDTH) for rows in (40, 16)]
    stats = Stats.from_inputs(x, sample=300)
    found = Form.parse(AWQ).fit_together(weights, [stats, stats])
    scales = [part.right.values for part in found if isinstance(part, Product) and isinstance(part.right, Diagonal)]
    assert torch.equal(*scales)
    size, best, least = np.abs(x.double().numpy()).mean(0), None, np.inf
    for power in range(6):
        scale = size ** (power / 6)
        scale = 2.0 ** np.round(np.log2(scale / np.sqrt(scale.max() * scale.min())))
        error = 0.0
        for weight in weights:
            scaled = torch.from_numpy(weight.double().numpy() * scale).float()
            seen = Stats.from_inputs(x.double() / torch.from_numpy(scale))
            rounded = Form.parse("int4(group=8)").fit(scaled, seen).to_dense().double().numpy() / scale
            error += float(((x.double().numpy() @ (weight.double().numpy() - rounded).T) ** 2).sum())
        if error < least:
            best, least = scale, error
    assert best is not None
    assert np.array_equal(1 / scales[0].double().numpy(), best)
    # One weight by itself takes one of its own.
    alone = Form.parse(AWQ.replace("shared=true, ", "")).fit(weights[0], stats)
    assert isinstance(alone, Product)
    assert isinstance(alone.right, Diagonal)
    assert not torch.equal(torch.frexp(alone.right.values).mantissa, torch.full((WIDTH,), 0.5))


def test_smoothing_takes_the_largest_weight_of_all_that_read_an_input() -> None:
    x = uneven(300, WIDTH)
    weights = [torch.randn(rows, WIDTH) for rows in (40, 16)]
    stats = Stats.from_inputs(x, sample=300)
    found = Form.parse("smoothquant(shared=true)").fit_together(weights, [stats, stats])
    scales = [part.right.values for part in found if isinstance(part, Product) and isinstance(part.right, Diagonal)]
    large = np.abs(np.concatenate([weight.double().numpy() for weight in weights])).max(0)
    scale = np.sqrt(np.abs(x.double().numpy()).max(0) / large)
    scale = 2.0 ** np.round(np.log2(scale / np.sqrt(scale.max() * scale.min())))
    for values in scales:
        assert np.array_equal(1 / values.double().numpy(), scale)


def test_a_shared_scale_is_refused_where_sites_are_chosen_one_by_one() -> None:
    program = recast.capture(nn.Sequential(nn.Linear(WIDTH, 16)).eval(), (torch.randn(2, WIDTH),))
    with pytest.raises(PlanError, match="is shared between sites"):
        recast.plan(program, {"budget": 0.5, "candidates": [AWQ, "int8"]})
    assert not isinstance(Form.parse(AWQ).fit(torch.randn(4, WIDTH)), Sum)
