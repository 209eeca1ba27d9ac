"""Attention heads with fewer features of queries and keys: scores against numpy, rotary pairs, and whole models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.calibrate import Calibration
from recast.passes.modules.cr_qk import pair_scores
from recast.passes.plan import Plan
from recast.patterns.program import Program
from tests import zoo
from tests.helpers import assert_close
from tests.passes.modules.models import HEAD, HEADS, WIDTH, Attention, Blocks, Gated, captured, inputs


def rewritten(program: Program, recipe: object, calibration: Calibration) -> Program:
    return recast.rewrite(program, recast.plan(program, recipe, calibration, progress=False), progress=False)


# ------------------------------------------------------------------ the fit


def test_scores_of_single_features_are_those_of_the_roots_columns() -> None:
    rng = np.random.default_rng(0)
    grams = [(z := rng.normal(size=(30, 5))).T @ z for _ in range(3)]  # two heads of queries, one of keys

    def columns(gram: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(gram)
        return np.linalg.norm(vectors * np.sqrt(values) @ vectors.T, axis=0)

    expected = sum(columns(q) * columns(grams[2]) for q in grams[:2])
    queries, keys = torch.tensor(np.stack(grams[:2])), torch.tensor(grams[2][None])
    assert_close(pair_scores(queries, keys, torch.arange(5))[0], torch.tensor(expected), terms=25)


def test_scores_of_pairs_do_not_change_with_the_angle() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 40, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    groups = torch.tensor([0, 1, 0, 1])
    plain = pair_scores(q.mT @ q, k.mT @ k, groups)
    turn = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 6
    cos, sin = turn.cos(), turn.sin()
    q = torch.cat([q[..., :2] * cos - q[..., 2:] * sin, q[..., 2:] * cos + q[..., :2] * sin], -1)
    assert_close(pair_scores(q.mT @ q, k.mT @ k, groups), plain, terms=40)


# ------------------------------------------------------------------ through the library


class Plain(nn.Module):
    """No rotary embedding; one scale written out, and the keys turned round for a product of their own."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, 4, 6).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(2, 3) / 6**0.5).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).reshape(b, t, WIDTH))


MAKES: dict[str, Callable[[], nn.Module]] = {
    "rotary": Attention,
    "rotary_grouped": lambda: Attention(grouped=True, bias=True),
    "rotary_written_out": lambda: Attention(3, fused=False),
    "fused": lambda: Plain(fused=True),
    "written_out": lambda: Plain(fused=False),
}


def masked(program: Program, smaller: Program) -> None:
    """Zero in the model itself the features that are gone, so that its scores are those of the smaller one."""
    for name in ("q.weight", "k.weight"):
        whole, part = program.weights[name], smaller.weights[name]
        stays = (whole[:, None] == part[None]).all(-1).any(1)
        assert int(stays.sum()) == len(part)
        whole[~stays] = 0
        bias = name.replace("weight", "bias")
        if bias in program.weights:
            program.weights[bias][~stays] = 0


@pytest.mark.parametrize("name", list(MAKES))
def test_the_same_as_features_set_to_zero(name: str) -> None:
    torch.manual_seed(0)
    program, calibration = captured(MAKES[name]())
    smaller = rewritten(program, "cr_qk(0.5)", calibration)
    (row,) = smaller.report.rows
    assert row.form == "cr_qk(ratio=0.5)"
    assert 2 * row.bytes_after == row.bytes_before
    assert 0 < row.predicted_error < 1
    assert smaller.report.passes["apply_modules"]["verified"]
    assert smaller.weights["q.weight"].shape[0] * 2 == program.weights["q.weight"].shape[0]
    dense = program(inputs())
    masked(program, smaller)
    for x in (inputs(), inputs(1, 1), inputs(3, HEADS), inputs(2, HEAD), inputs(1, WIDTH)):
        assert_close(smaller(x), program(x), terms=WIDTH)
    assert float((dense - program(inputs())).norm()) > 1e-3 * float(dense.norm())


def test_predicted_error_is_that_of_all_scores() -> None:
    torch.manual_seed(0)
    program, calibration = captured(Plain(fused=True))
    smaller = rewritten(program, "cr_qk(0.5)", calibration)
    data = torch.cat([inputs(8, 16, s) for s in range(2, 6)]).flatten(0, 1)

    def scores() -> Tensor:
        weights = program.weights
        q, k = (
            nn.functional.linear(data, weights[f"{n}.weight"], weights[f"{n}.bias"]).view(-1, 4, 6).transpose(0, 1)
            for n in ("q", "k")
        )
        return q @ k.mT

    whole = scores()
    masked(program, smaller)
    assert smaller.report.rows[0].predicted_error == pytest.approx(float((scores() - whole).norm() / whole.norm()))


def test_error_falls_with_what_is_kept_and_all_is_exact() -> None:
    torch.manual_seed(0)
    program, calibration = captured(Attention())
    plans = [recast.plan(program, f"cr_qk({r})", calibration, progress=False) for r in (0.25, 0.5, 0.75)]
    errors = [entry.predicted_error for plan in plans for entry in plan.entries.values()]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)
    whole = rewritten(program, {"default": "cr_qk(1.0)", "allow_larger": True}, calibration)
    assert_close(whole(inputs()), program(inputs()), terms=WIDTH)


def test_every_form_of_attention_together() -> None:
    torch.manual_seed(0)
    model = Blocks(Attention(), Gated()).eval().requires_grad_(False)
    program = recast.capture(model, (inputs().float(),))
    calibration = recast.calibrate(program, [inputs(8, 16).float()], progress=False)
    recipe = {
        "default": "int8",
        "rules": [
            {"match": "layers.1", "kind": "mlp", "form": "nystrom(0.75)"},
            {"match": "layers.0", "kind": "attention", "form": "svd_vo(0.75)"},
            {"match": "layers.0", "kind": "attention", "form": "cr_qk(0.75)"},
        ],
    }
    decided = recast.plan(program, recipe, calibration, progress=False)
    assert list(decided.entries)[:3] == ["layers.0", "layers.0:qk", "layers.1"]
    assert not decided.notes
    again = Plan.parse(str(decided))
    smaller = recast.rewrite(program, again, calibration=calibration, progress=False)
    rows = {row.name: row for row in smaller.report.rows}
    assert rows["layers.0.q"].shape == (HEADS * 6, WIDTH)
    assert rows["layers.0.k"].shape == (2 * 6, WIDTH)
    assert rows["layers.0.o"].shape == (WIDTH, HEADS * 6)
    lowered = recast.lower(smaller, "onnx")
    for x in (inputs(3, HEADS).float(), inputs(1, 5).float()):
        assert torch.nn.functional.cosine_similarity(smaller(x).flatten(), program(x).flatten(), 0) > 0.9
        assert_close(lowered(x), smaller(x), terms=WIDTH, factor=1e3)


class Normed(Attention):
    """Queries and keys normalised in each head, over all its features."""

    def __init__(self) -> None:
        super().__init__(HEADS)
        self.norm = nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return x + self.o(y.transpose(1, 2).reshape(b, t, HEADS * HEAD))


def test_what_cannot_be_followed_stays_with_the_reason() -> None:
    program, calibration = captured(Normed())
    decided = recast.plan(program, "cr_qk(0.5)", calibration, progress=False)
    assert not decided.entries
    assert any("stands in the way and reads all features" in skip.reason for skip in decided.skipped), decided.skipped


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_of_transformers(family: str) -> None:
    model, args, kwargs = zoo.build(family)
    program = recast.capture(model, args, kwargs)
    name = next(n.name for n in program.inputs())
    ids = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(0))
    batch = {**{k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}, name: ids}
    calibration = recast.calibrate(program, [batch], progress=False)
    smaller = rewritten(program, "cr_qk(0.5, round_to=2)", calibration)
    assert smaller.report.passes["apply_modules"]["verified"]
    assert {row.form for row in smaller.report.rows} == {"cr_qk(ratio=0.5, round_to=2)"}
    assert all(2 * row.bytes_after == row.bytes_before for row in smaller.report.rows)
    for some in (ids[:1, :4], ids[:3, :2]):
        dense, mine = (torch.utils._pytree.tree_leaves(run(**{**batch, name: some}))[0] for run in (program, smaller))
        assert dense.shape == mine.shape
        assert torch.nn.functional.cosine_similarity(dense.flatten(), mine.flatten(), 0) > 0.5
