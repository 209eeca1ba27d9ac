"""Random small models made of blocks in random spellings, each saying what it planted: for fuzzing recognition and rewriting."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["WIDTH", "Linear", "Model", "Planted", "random_model"]

F = nn.functional
Planted = dict[str, int]  # how many sites of each kind a model holds
WIDTH = 12  # features that blocks take and give


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


class Linear(nn.Module):
    """``y = x Wᵀ + b`` in one of many spellings."""

    spellings = (
        "linear",
        "transposed",
        "stored_in_out",
        "addmm",
        "einsum",
        "left",
        "conv",
        "doubled",
        "viewed",
    )

    def __init__(self, draw: random.Random, n: int, m: int) -> None:
        super().__init__()
        self.spelling = draw.choice(self.spellings)
        self.flip = draw.random() < 0.5
        self.bias = nn.Parameter(torch.randn(m)) if draw.random() < 0.6 else None
        if self.spelling == "addmm" and self.bias is None:
            self.spelling = "transposed"
        if self.spelling in ("linear", "addmm", "conv") or (
            self.bias is None and self.spelling not in ("einsum", "transposed")
        ):
            self.flip = False  # there is nothing to be flipped
        stored = {"stored_in_out": (n, m), "conv": (m, n, 1), "viewed": (m * n,)}.get(self.spelling, (m, n))
        self.weight = nn.Parameter(torch.randn(stored) / math.sqrt(n))
        self.n, self.m = n, m

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, n) to (batch, tokens, m)."""
        w, bias = self.weight, self.bias
        if self.spelling == "linear":
            return F.linear(x, w, bias)
        if self.spelling == "addmm":
            assert bias is not None
            return torch.addmm(bias, x.reshape(-1, self.n), w.t()).view(*x.shape[:-1], self.m)
        if self.spelling == "conv":
            return F.conv1d(x.transpose(1, 2), w, bias).transpose(1, 2)
        if self.spelling == "einsum":
            y = torch.einsum("bti,oi->bto", x, w) if self.flip else torch.einsum("oi,...i->...o", w, x)
        elif self.spelling == "stored_in_out":
            y = x @ w
        elif self.spelling == "left":
            y = (w @ x.transpose(1, 2)).transpose(1, 2)
        elif self.spelling == "doubled":
            y = (x.double() @ w.double().t()).to(x.dtype)
        elif self.spelling == "viewed":
            y = torch.matmul(x, w.view(self.m, self.n).t())
        else:
            y = torch.matmul(x, w.t()) if self.flip else torch.matmul(x, w.permute(1, 0))
        return y if bias is None else (bias + y if self.flip else y + bias)


class Norm(nn.Module):
    """LayerNorm or RMSNorm in one of many spellings."""

    def __init__(self, draw: random.Random, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(n) + 0.5), nn.Parameter(torch.randn(n))
        self.n = n
        self.layer, self.operation = draw.random() < 0.5, draw.random() < 0.3
        self.square, self.root = draw.choice(("pow", "mul")), draw.choice(("rsqrt", "divide", "pow"))
        self.flip, self.offset, self.wide = (draw.random() < 0.5 for _ in range(3))
        self.scaled = draw.random() < 0.8
        if self.operation:
            self.square = self.root = "inside"
            self.flip = self.offset = self.wide = False
        self.scaled = self.scaled or self.operation
        self.offset = self.offset and self.scaled

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if self.operation:
            if self.layer:
                return F.layer_norm(x, (self.n,), self.weight, self.bias, 1e-5)
            return F.rms_norm(x, (self.n,), self.weight, 1e-6)
        dtype = x.dtype
        h = x.double() if self.wide else x
        if self.layer:
            h = h - h.mean(-1, keepdim=True)
        square = h.pow(2) if self.square == "pow" else h * h
        mean = square.mean(-1, keepdim=True) + 1e-6
        if self.root == "rsqrt":
            root = torch.rsqrt(mean)
            h = root * h if self.flip else h * root
        elif self.root == "pow":
            h = h * mean.pow(-0.5)
        else:
            h = h / torch.sqrt(mean)
        h = h.to(dtype)
        if not self.scaled:
            return h
        weight = 1 + self.weight if self.offset else self.weight
        h = weight * h if self.flip else h * weight
        return h + self.bias if self.layer else h


class Attention(nn.Module):
    """Self-attention with its four linears, the core in one of many spellings."""

    def __init__(self, draw: random.Random, n: int) -> None:
        super().__init__()
        self.heads, self.d = draw.choice(((2, 6), (3, 4), (4, 3)))
        self.groups = draw.choice((1, self.heads)) if draw.random() < 0.4 else 1
        kv = self.heads // self.groups
        self.q = Linear(draw, n, self.heads * self.d)
        self.k, self.v = Linear(draw, n, kv * self.d), Linear(draw, n, kv * self.d)
        self.o = Linear(draw, self.heads * self.d, n)
        self.core = draw.choice(
            ("sdpa", "causal", "plain", "scaled_query", "divided", "filled", "where", "capped", "einsum")
        )
        self.flip, self.repeat = draw.random() < 0.5, draw.choice(("expand", "interleave"))
        self.repeat = self.repeat if self.groups > 1 else "none"
        self.flip = self.flip and self.core not in ("sdpa", "causal", "filled", "where")

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(*x.shape[:2], heads, self.d).transpose(1, 2)

    def _repeat(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x
        if self.repeat == "interleave":
            return x.repeat_interleave(self.groups, 1)
        return x[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, n) to the same."""
        q = self._split(self.q(x), self.heads)
        k, v = (self._repeat(self._split(f(x), self.heads // self.groups)) for f in (self.k, self.v))
        t, scale = x.shape[1], 1 / math.sqrt(self.d)
        if self.core in ("sdpa", "causal"):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.core == "causal")
        else:
            q = q * scale if self.core == "scaled_query" else q
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) if self.core == "einsum" else q @ k.transpose(2, 3)
            if self.core == "divided":
                scores = scores / math.sqrt(self.d)
            elif self.core == "plain":
                scores = scale * scores if self.flip else scores * scale
            elif self.core == "capped":
                scores = 5 * torch.tanh(scores / 5)
            above = torch.ones(t, t, dtype=torch.bool).triu(1)
            if self.core == "filled":
                scores = scores.masked_fill(above, -1e9)
            elif self.core == "where":
                scores = torch.where(above, torch.full_like(scores, -1e9), scores)
            elif self.flip:
                mask = above.to(scores.dtype) * -1e9
                scores = mask + scores
            weights = scores.softmax(-1)
            y = torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.core == "einsum" else weights @ v
        result: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return result


class Mixture(nn.Module):
    """A small mixture of experts: every expert over all tokens, weighted by what the router chose."""

    def __init__(self, draw: random.Random, n: int) -> None:
        super().__init__()
        self.count, self.top, hidden = 3, draw.choice((1, 2)), 5
        self.router = nn.Linear(n, self.count, bias=False)
        self.gated = draw.random() < 0.5
        self.up = nn.ModuleList(nn.Linear(n, hidden * (2 if self.gated else 1), bias=False) for _ in range(self.count))
        self.down = nn.ModuleList(nn.Linear(hidden, n, bias=False) for _ in range(self.count))
        self.renormalise, self.first = draw.random() < 0.5, draw.random() < 0.5
        self.renormalise = self.renormalise and self.first

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, n) to the same."""
        scores = self.router(x)
        if self.first:
            scores = scores.softmax(-1)
        chosen, index = scores.topk(self.top, -1)
        if not self.first:
            chosen = chosen.softmax(-1)
        elif self.renormalise:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for i in range(self.count):
            share = (chosen * (index == i)).sum(-1, keepdim=True)
            h = self.up[i](x)
            if self.gated:
                a, b = h.chunk(2, -1)
                h = F.silu(a) * b
            else:
                h = F.gelu(h)
            y = y + share * self.down[i](h)
        return y


class MLP(nn.Module):
    """A feed-forward block, gated or plain."""

    def __init__(self, draw: random.Random, n: int) -> None:
        super().__init__()
        self.gate = Linear(draw, n, 9) if draw.random() < 0.5 else None
        self.up, self.down = Linear(draw, n, 9), Linear(draw, 9, n)
        self.act: Callable[[Tensor], Tensor] = draw.choice((F.silu, F.gelu, F.relu))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, n) to the same."""
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        result: Tensor = self.down(h)
        return result


class Model(nn.Module):
    """Blocks one after the other, some with a residual connection, some with their result used twice."""

    def __init__(self, draw: random.Random, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.residual = [draw.random() < 0.6 for _ in blocks]
        self.extra = draw.randrange(len(blocks)) if draw.random() < 0.4 else -1

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, tokens, n) to the same, and perhaps a value from the middle."""
        kept = []
        for i, (block, residual) in enumerate(zip(self.blocks, self.residual, strict=True)):
            y = block(x)
            x = x + y if residual else y
            if i == self.extra:
                kept.append(y)
        return (x, *kept)


_BLOCKS: dict[str, tuple[Callable[..., nn.Module], Planted]] = {
    "linear": (lambda draw, n: Linear(draw, n, n), {"linear": 1}),
    "norm": (Norm, {"norm": 1}),
    "attention": (Attention, {"linear": 4, "attention": 1}),
    "mlp": (MLP, {"mlp": 1}),
    "moe": (Mixture, {"linear": 7, "moe": 1}),
}


def random_model(seed: int | random.Random) -> tuple[Model, Planted, str]:
    """Make a model.

    Parameters
    ----------
    seed
        Of everything random; the same seed gives the same model. Or what to draw with.

    Returns
    -------
    model, planted, text
        The model in float32 and eval mode, taking (batch, tokens, 12); how many sites it holds by kind; what it is made of.
    """
    draw = random.Random(seed) if isinstance(seed, int) else seed
    with torch.random.fork_rng():
        torch.manual_seed(draw.randrange(2**31))
        names = [draw.choice(list(_BLOCKS)) for _ in range(draw.randint(1, 4))]
        blocks, planted = [], dict.fromkeys(("linear", "norm", "attention", "moe", "mlp"), 0)
        for name in names:
            make, holds = _BLOCKS[name]
            block = make(draw, WIDTH)
            blocks.append(block)
            for kind, count in holds.items():
                planted[kind] += count
            if isinstance(block, MLP):
                planted["linear"] += 2 + (block.gate is not None)
        model = Model(draw, blocks).eval()
    described = [f"{name}({_options(block)})" for name, block in zip(names, blocks, strict=True)]
    return model, planted, ", ".join(described)


def _options(block: nn.Module) -> str:
    """The spelling, that of each linear among it."""
    shown = {k: v for k, v in vars(block).items() if isinstance(v, bool | int | str) and not k.startswith("_")}
    shown |= {k: v.__name__ for k, v in vars(block).items() if callable(v) and hasattr(v, "__name__")}
    parts = [f"{k}={v}" for k, v in shown.items() if k not in ("training", "n", "m")]
    if isinstance(block, Linear):
        parts.append(f"bias={block.bias is not None}")
    linears = [(name, child) for name, child in block.named_children() if isinstance(child, Linear)]
    return ", ".join(parts + [f"{name}=({_options(child)})" for name, child in linears])
