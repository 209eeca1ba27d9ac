"""Attention heads with fewer value features: the fit against numpy, and whole models made smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.calibrate import Calibration
from recast.passes.modules.svd_vo import narrowed
from recast.patterns.program import Program
from tests import zoo
from tests.helpers import assert_close
from tests.passes.modules.models import HEAD, HEADS, WIDTH, Attention, Blocks, Gated, PackedAttention, captured, inputs

BOTH = {
    "rules": [
        {"match": "*", "kind": "mlp", "form": "nystrom(0.75)"},
        {"match": "*", "kind": "attention", "form": "svd_vo(0.75)"},
    ]
}


def rewritten(program: Program, recipe: object, calibration: Calibration) -> Program:
    return recast.rewrite(program, recast.plan(program, recipe, calibration, progress=False), progress=False)


# ------------------------------------------------------------------ the fit


@pytest.mark.parametrize("queries", [1, 3])
def test_error_is_the_tail_of_the_singular_values(queries: int) -> None:
    rng = np.random.default_rng(queries)
    h = rng.normal(size=(60, 10)) @ rng.normal(size=(10, 10))
    w_v, w_o = rng.normal(size=(10, 6)), rng.normal(size=(6, 7 * queries))
    values, vectors = np.linalg.eigh(h.T @ h)
    root = vectors * np.sqrt(values) @ vectors.T
    tail = np.linalg.svd(root @ w_v @ w_o, compute_uv=False)
    moments = torch.from_numpy(w_v.T @ h.T @ h @ w_v)
    for count in range(1, 7):
        down, up = narrowed(moments, [torch.from_numpy(w.T) for w in np.split(w_o, queries, 1)], count)
        gap = h @ w_v @ (np.eye(6) - (up @ down).numpy().T) @ w_o
        assert np.linalg.norm(gap) == pytest.approx(np.linalg.norm(tail[count:]), abs=1e-9 * tail[0])


def test_values_that_do_not_vary_in_some_direction() -> None:
    moments = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    down, up = narrowed(moments, [torch.eye(3, dtype=torch.float64)], 3)
    assert_close(up @ down, torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)))
    down, up = narrowed(torch.zeros(3, 3), [torch.eye(3)], 2)
    assert bool((up @ down == 0).all())


# ------------------------------------------------------------------ through the library

MAKES: dict[str, Callable[[], nn.Module]] = {
    "repeated": Attention,
    "grouped": lambda: Attention(grouped=True),
    "written_out": lambda: Attention(fused=False, bias=True),
    "one_head_of_values": lambda: Attention(1, bias=True),
    "no_sharing": lambda: Attention(HEADS),
    "packed": PackedAttention,
}


@pytest.mark.parametrize("name", list(MAKES))
def test_what_is_reported_is_what_runs(name: str) -> None:
    torch.manual_seed(0)
    program, calibration = captured(MAKES[name]())
    smaller = rewritten(program, "svd_vo(0.5)", calibration)
    (row,) = smaller.report.rows
    held = {n: w for n, w in smaller.weights.items() if w.ndim == 2}
    assert held["o.weight"].shape == (WIDTH, HEADS * HEAD // 2)
    assert row.bytes_after == 8 * sum(held[f"{part}.weight"].numel() for part in row.parts)
    data = [inputs(8, 16, s) for s in range(2, 6)]
    bias = program.weights.get("o.bias", torch.zeros(WIDTH, dtype=torch.float64))
    gaps = [((smaller(x) - program(x)).square().sum(), (program(x) - x - bias).square().sum()) for x in data]
    error = (sum(g for g, _ in gaps) / sum(s for _, s in gaps)) ** 0.5
    assert row.predicted_error == pytest.approx(float(error), rel=1e-6)
    assert 0.001 < row.predicted_error < 0.7
    assert smaller.report.passes["apply_modules"]["verified"]
    for x in (inputs(1, 1), inputs(3, HEADS), inputs(2, HEAD), inputs(1, WIDTH)):
        assert smaller(x).shape == x.shape


def test_error_falls_with_what_is_kept_and_refitting_is_never_worse() -> None:
    torch.manual_seed(0)
    program, calibration = captured(Attention(bias=True))
    errors: dict[str, list[float]] = {"false": [], "true": []}
    for refit, found in errors.items():
        for kept in (1, 3, 4, 7):
            decided = recast.plan(program, f"svd_vo({kept / HEAD}, refit={refit})", calibration, progress=False)
            found += [entry.predicted_error for entry in decided.entries.values()]
        assert len(found) == 4
        assert found[0] > 3 * found[-1] > 0
    # Spaces of values contain each other, and the output is solved for in each.
    assert errors["true"] == sorted(errors["true"], reverse=True)
    assert all(refit < plain for plain, refit in zip(*errors.values(), strict=True))


def test_everything_kept_is_exact() -> None:
    torch.manual_seed(0)
    program, calibration = captured(Attention(bias=True))
    smaller = rewritten(program, {"default": "svd_vo(1.0)", "allow_larger": True}, calibration)
    assert smaller.report.rows[0].predicted_error == 0
    assert torch.equal(smaller(inputs()), program(inputs()))


def test_both_kinds_and_int8_behind_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks(Attention(), Gated(), Attention(bias=True), Gated()).eval()
    program = recast.capture(model, (inputs().float(),))
    calibration = recast.calibrate(program, [inputs(8, 16).float()], progress=False)
    smaller = rewritten(program, {**BOTH, "default": "int8"}, calibration)
    rows = {row.name: row for row in smaller.report.rows}
    assert rows["layers.0"].form == "svd_vo(ratio=0.75)"
    assert rows["layers.0.v"].shape == (2 * 6, WIDTH)
    assert rows["layers.0.o"].shape == (WIDTH, HEADS * 6)
    assert rows["layers.0.o"].form == "int8"
    artifact = recast.lower(smaller, "onnx")
    artifact.save(tmp_path / "kept")
    again = recast.load(tmp_path / "kept")
    for x in (inputs(3, HEADS).float(), inputs(1, 5).float()):
        assert_close(again(x), smaller(x), terms=WIDTH, factor=1e3)


def outputs(found: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(found) if isinstance(v, Tensor) and v.is_floating_point()]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_models_of_transformers(family: str, tmp_path: Path) -> None:
    model, args, kwargs = zoo.build(family)
    program = recast.capture(model, args, kwargs)
    ids = [torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    name = next(n.name for n in program.inputs())
    batches = [{**{k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}, name: i} for i in ids]
    calibration = recast.calibrate(program, batches, progress=False)
    smaller = rewritten(program, BOTH, calibration)
    forms = [row.form for row in smaller.report.rows]
    assert forms.count("nystrom(ratio=0.75)") == forms.count("svd_vo(ratio=0.75)") > 0
    assert all(row.measured_error < 0.6 for row in smaller.report.rows)
    kept = recast.lower(smaller, "eager")
    kept.save(tmp_path / "kept")
    again = recast.load(tmp_path / "kept")
    for batch in (*batches[:1], {**batches[0], name: ids[1][:1, :4]}, {**batches[0], name: ids[2][:3, :2]}):
        dense, mine, loaded = (outputs(run(**batch)) for run in (program, smaller, again))
        for a, b, c in zip(dense, mine, loaded, strict=True):
            assert a.shape == b.shape
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.5
            assert torch.equal(b, c)


# ------------------------------------------------------------------ refusals


class NormedValues(Attention):
    def __init__(self) -> None:
        super().__init__(HEADS)
        self.norm = nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, self.norm(v))
        return x + self.o(y.transpose(1, 2).reshape(b, t, HEADS * HEAD))


class Activated(Attention):
    """An activation of the values; a factor for each head and token after attention would do."""

    def __init__(self) -> None:
        super().__init__(HEADS)
        self.factor = nn.Linear(WIDTH, HEADS)

    def values(self, v: Tensor) -> Tensor:
        return v.tanh()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, self.values(v)).transpose(1, 2)
        return x + self.o((y * self.factor(x).sigmoid()[..., None]).reshape(b, t, HEADS * HEAD))


class Scaled(Activated):
    def values(self, v: Tensor) -> Tensor:
        return v * 2.0


def test_factors_on_the_way_are_gone_through() -> None:
    torch.manual_seed(0)
    program, calibration = captured(Scaled())
    smaller = rewritten(program, "svd_vo(0.75)", calibration)
    assert smaller.weights["o.weight"].shape == (WIDTH, HEADS * 6)
    assert smaller.report.passes["apply_modules"]["verified"]


class ValuesGivenOut(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).reshape(b, t, HEADS * HEAD)), v


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Activated, "'tanh' (tanh) is not linear in the features"),
        (NormedValues, "stands in the way and reads all features"),
        (lambda: ValuesGivenOut(HEADS), "is a result of the model itself"),
    ],
)
def test_what_cannot_be_followed_stays_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    program, calibration = captured(make())
    decided = recast.plan(program, "svd_vo(0.5)", calibration, progress=False)
    assert not decided.entries
    assert any(reason in skip.reason for skip in decided.skipped), decided.skipped
