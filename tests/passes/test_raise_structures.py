"""Raising into the dialect: whole models give what they gave, and everything that takes a program takes a raised one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import recast
from recast.passes.base import Context, Pipeline
from recast.passes.cache import OperatorCache
from recast.passes.dialect import has_dialect, inline_dialect, is_dialect
from recast.passes.plan import Plan
from recast.passes.report import fidelity
from recast.passes.rules.cast import Cast
from recast.passes.rules.raise_structures import RaiseStructures, raise_program
from recast.passes.verify import check, coarsest_dtype, exact_bound
from recast.patterns.capture.export import capture
from recast.patterns.program import Program
from tests.zoo.generator import build, vary

D, HEADS = 16, 4
KINDS = ("norm", "rotary")


class Block(nn.Module):
    """Two norms, a rotary embedding, and what they are used by."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(D))
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, D)
        self.register_buffer("frequencies", torch.rand(D // HEADS // 2))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.scale * h.to(x.dtype)
        h = self.up(h).view(*x.shape[:-1], HEADS, D // HEADS).transpose(1, 2)
        angles = torch.arange(x.shape[1])[:, None].float() * self.frequencies.float()
        cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
        a, b = h.chunk(2, -1)
        h = h * cos + torch.cat((-b, a), -1) * sin
        result: Tensor = self.norm(h.transpose(1, 2).flatten(2) + x)
        return result


def context() -> Context:
    return Context(Plan("", {}), None, OperatorCache(None))


def called(program: Program) -> list[str]:
    return [n.target.__name__ for n in program.graph.nodes if is_dialect(n)]


def same(a: Any, b: Any, bound: float) -> None:
    for left, right in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(left, Tensor) and left.is_floating_point():
            assert left.dtype == right.dtype
            assert fidelity(left, right)["relative_error"] <= bound


@pytest.fixture(scope="module")
def block() -> tuple[Block, Program]:
    model = Block().eval()
    return model, capture(model, (torch.randn(2, 5, D),))


def test_text(block: tuple[Block, Program]) -> None:
    raised = raise_program(block[1], KINDS)
    assert called(raised) == ["rms_norm", "rotary", "layer_norm"]
    assert str(raised) == str(raise_program(raised, KINDS))  # nothing is left to raise
    line = next(line for line in str(raised).splitlines() if " rms_norm(" in line)
    assert line.strip().endswith("= rms_norm(x, scale: f32[16], eps=1e-06)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_verified(dtype: torch.dtype) -> None:
    model = Block(dtype).eval()
    program = capture(model, (torch.randn(2, 5, D, dtype=dtype),))
    step = RaiseStructures("norm+rotary")
    raised = step.run(program, context())
    assert check(program, raised, step, context())["verified"]
    for batch, length in ((1, 7), (3, HEADS), (2, 1)):
        x = torch.randn(batch, length, D, dtype=dtype)
        same(model(x), raised(x), exact_bound(coarsest_dtype(program)))


def test_what_stays_because_it_is_read_elsewhere_is_raised_too() -> None:
    """A norm without its weight is left of a norm whose middle is a result as well; a second run finds nothing."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(D))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = x - x.mean(-1, keepdim=True)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return h * self.weight + self.bias, h

    model = Shared().eval()
    raised = raise_program(capture(model, (torch.randn(2, 5, D),)))
    assert called(raised) == ["layer_norm", "layer_norm"]
    assert str(raise_program(raised)) == str(raised)
    x = torch.randn(3, HEADS, D)
    same(model(x), raised(x), exact_bound(torch.float32))


def test_kinds(block: tuple[Block, Program]) -> None:
    assert called(raise_program(block[1], ("rotary",))) == ["rotary"]
    (step,) = Pipeline.parse("raise_structures{kinds=norm}").passes
    told = context()
    assert called(step.run(block[1], told)) == ["rms_norm", "layer_norm"]
    assert told.notes["raise_structures"] == "2 norm"


def test_traced_away(block: tuple[Block, Program]) -> None:
    model, program = block
    raised = raise_program(program, KINDS)
    flat = inline_dialect(raised)
    assert has_dialect(raised)
    assert not has_dialect(flat)
    assert inline_dialect(flat) is flat
    for node in flat.graph.nodes:
        assert node.op in ("output", "call_module") or "val" in node.meta
    x = torch.randn(3, HEADS, D)
    same(model(x), flat(x), exact_bound(torch.float32))


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_lowered(block: tuple[Block, Program], target: str) -> None:
    model, program = block
    artifact = recast.lower(raise_program(program, KINDS), target=target)
    for batch, length in ((2, 5), (3, HEADS)):
        x = torch.randn(batch, length, D)
        same(model(x), artifact(x), exact_bound(torch.float32))


def test_saved(block: tuple[Block, Program], tmp_path: Path) -> None:
    model, program = block
    recast.lower(raise_program(program, KINDS), target="eager").save(tmp_path / "saved")
    x = torch.randn(3, HEADS, D)
    same(model(x), recast.load(tmp_path / "saved")(x), exact_bound(torch.float32))


def test_cast(block: tuple[Block, Program]) -> None:
    """Another dtype after raising gives what it gives without."""
    raised = raise_program(block[1], KINDS)
    x = torch.randn(3, HEADS, D)
    plain, late = (Cast("bf16").run(p, context())(x) for p in (block[1], raised))
    same(plain, late, exact_bound(torch.bfloat16))


def test_fingerprint_is_the_same_everywhere(block: tuple[Block, Program]) -> None:
    raised = raise_program(block[1], KINDS)
    assert raised.fingerprint() == raise_program(block[1], KINDS).fingerprint() != block[1].fingerprint()
    assert " at 0x" not in str(raised)


def test_original_is_not_changed(block: tuple[Block, Program]) -> None:
    before = str(block[1])
    raise_program(block[1])
    assert str(block[1]) == before


FAMILIES = {
    "llama": (5, 4),
    "gemma3_text": (13, 4),
    "cohere": (3, 4),
    "gpt_neox": (5, 4),
    "deepseek_v3": (9, 4),
    "t5": (12, 0),
    "bert": (6, 0),
}


# float32 hides what a cast does: every family in another dtype, those whose norms differ in both.
DTYPES = {
    "llama": (torch.float64, torch.bfloat16),
    "gemma3_text": (torch.float64, torch.bfloat16),
    "bert": (torch.float32,),
}
FAMILY_CASES = [(family, dtype) for family in FAMILIES for dtype in DTYPES.get(family, (torch.bfloat16,))]


@pytest.mark.parametrize(("family", "dtype"), FAMILY_CASES, ids=str)
def test_family(family: str, dtype: torch.dtype) -> None:
    """Tiny transformers models with their heads as many as tokens, in three dtypes."""
    pytest.importorskip("transformers")
    model, args, kwargs = build(family)
    model = model.to(dtype)
    program = capture(model, args, kwargs)
    raised = raise_program(program, KINDS)
    names = called(raised)
    rotary = sum(name.startswith("rotary") for name in names)
    assert (len(names) - rotary, rotary) == FAMILIES[family]
    assert not [n for n in raised.graph.nodes if n.target is torch.ops.aten.rsqrt.default]
    bound = exact_bound(coarsest_dtype(program))
    for batch, length in ((1, 7), (3, 4), (2, 13)):
        inputs = vary(model, batch, length)
        with torch.no_grad():
            same(program(*inputs[0], **inputs[1]), raised(*inputs[0], **inputs[1]), bound)


def test_symbolic_sizes_stay() -> None:
    """Types of raised values keep the symbols that capture gave."""
    program = capture(nn.LayerNorm(8).eval(), (torch.randn(2, 3, 8),))
    (node,) = [n for n in raise_program(program).graph.nodes if is_dialect(n)]
    assert isinstance(node, fx.Node)
    assert [isinstance(s, int) for s in node.meta["val"].shape] == [False, False, True]
