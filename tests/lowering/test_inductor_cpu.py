"""What Inductor's programs become on a CPU besides packed weights: our attention, and products that are rounded once."""

from collections import Counter

import pytest
import torch
from torch import nn

import recast
from recast.kernels.quantized_matmul.ops import has_vnni
from recast.lowering.inductor import Inductor
from recast.lowering.inductor.attention import with_own_attention
from recast.passes.report import fidelity

OWN = "attention_of_heads"


class Block(nn.Module):
    """Attention over 63 tokens or as many as there are, with a mask of padding as transformers makes it, and an MLP."""

    def __init__(self, heads: int = 6, width: int = 60) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(width, 130), nn.Linear(130, width), nn.LayerNorm(width)

    def forward(self, x, seen):
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        rows = torch.arange(x.shape[1])
        mask = (rows[None, None, :, None] >= 0) & seen.bool()[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, x.shape[1], -1))
        x = self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.down(nn.functional.gelu(self.up(x)))


def inputs(tokens=63, batch=3, dtype=torch.float32):
    seen = torch.ones(batch, tokens, dtype=torch.int64)
    seen[-1, tokens // 2 :] = 0
    return torch.randn(batch, tokens, 60, dtype=dtype), seen


@pytest.fixture
def measured(monkeypatch):
    """As if our attention had been measured to be faster for up to 128 keys."""
    monkeypatch.setattr("recast.lowering.inductor.attention._measured", lambda *_: 128)


def calls(program):
    return Counter(getattr(node.target, "_opname", "") for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_attention(measured, dtype):
    model = Block().eval().to(dtype)
    program = recast.capture(model, inputs(dtype=dtype))
    changed = with_own_attention(program)
    assert calls(changed)[OWN] == 1
    assert calls(program)[OWN] == 0
    assert calls(changed)["arange"] == 0  # the question whether rows are 0 or more is gone with the mask that it spread
    artifact = recast.lower(program, "inductor")
    for tokens in (63, 6, 200):  # as many as heads, and more keys than ours is for
        x, seen = inputs(tokens, dtype=dtype)
        with torch.no_grad():
            assert fidelity(model(x, seen), artifact(x, seen))["relative_error"] < (
                1e-5 if dtype == torch.float32 else 2e-2
            )


def test_torchs_attention_where_it_is_faster(monkeypatch):
    monkeypatch.setattr("recast.lowering.inductor.attention._measured", lambda *_: 0)
    program = recast.capture(Block().eval(), inputs())
    assert with_own_attention(program) is program


@pytest.mark.parametrize("kind", ["float64", "three axes", "no kernel"])
def test_what_our_attention_does_not_take(kind, measured, monkeypatch):
    if kind == "no kernel":
        monkeypatch.setattr("recast.lowering.inductor.attention.short_keys.unavailable", lambda: "no compiler")

    class Bare(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    q = torch.randn(
        *((3, 9, 8) if kind == "three axes" else (1, 3, 9, 8)), dtype=torch.float64 if kind == "float64" else None
    )
    program = recast.capture(Bare().eval(), (q,))
    assert with_own_attention(program) is program


@pytest.mark.skipif(not has_vnni(), reason="this processor has no VNNI")
@pytest.mark.parametrize(
    "form", [f"int8(activations=true{more})" for more in ("", ", static=true", ", per_token=false")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_rounded_once(form, dtype, measured):
    model = Block().eval().to(dtype)
    program = recast.capture(model, inputs(dtype=dtype))
    stats = recast.calibrate(program, [inputs(dtype=dtype)])
    rewritten = recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}, stats))
    flat, kernels = Inductor()._inlined(rewritten)
    found = calls(flat)
    shared = (
        4 if "per_token" in form else 3
    )  # q, k and v of one; out; up; with one scale for all, down's inputs are met apart
    assert (found["rounded_linear"], found["rounded_linear_codes"], found["round_rows"]) == (
        (6, 0, shared) if "per_token" in form else (5, 1, shared)
    )
    assert kernels["up"] == "recast int8 product (VNNI) + bias + gelu"
    assert kernels["out"].endswith("+ bias + residual")
    eager, artifact = recast.lower(rewritten, "eager"), recast.lower(rewritten, "inductor")
    for tokens in (63, 1, 17):
        given = inputs(tokens, dtype=dtype)
        with torch.no_grad():
            # A rounding tie may fall either way: one step of one activation is 1/255 of its range.
            assert fidelity(eager(*given), artifact(*given))["relative_error"] < (
                1e-3 if dtype == torch.float32 else 2e-2
            )
