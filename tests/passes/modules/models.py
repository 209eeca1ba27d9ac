"""Small models that blocks are made smaller in, spelled as larger ones are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recast
from recast.passes.calibrate import Calibration
from recast.patterns.program import Program

WIDTH, HIDDEN = 24, 40


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """Gate and up in one matrix, taken apart by halves."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Woven(Packed):
    """Gate and up in one matrix, in turns."""

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return x + self.down(F.silu(both[..., ::2]) * both[..., 1::2])


class Flat(nn.Module):
    """The hidden values flattened over tokens and back, as `addmm` in GPT-2 has them; weights lie transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.randn(WIDTH, HIDDEN) / 5),
            nn.Parameter(torch.randn(HIDDEN, WIDTH) / 5),
        )
        self.bias = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = torch.addmm(self.bias, x.view(-1, WIDTH), self.first).view(b, t, HIDDEN)
        h = F.gelu(h, approximate="tanh").reshape(-1, HIDDEN)
        return x + torch.mm(h, self.second).view(b, t, WIDTH)


class Blocks(nn.Module):
    """Blocks one after another; the same one may come twice."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(count: int = 2, tokens: int = 7, seed: int = 1) -> Tensor:
    """Correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(count, tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x @ mix * torch.linspace(0.1, 1.0, WIDTH, dtype=torch.float64) / 3


def captured(model: nn.Module) -> tuple[Program, Calibration]:
    """A model in float64, captured with free sizes of batch and tokens, and statistics."""
    program = recast.capture(model.double().eval().requires_grad_(False), (inputs(),))
    return program, recast.calibrate(program, [inputs(8, 16, seed) for seed in range(2, 6)], progress=False)


HEADS, HEAD = 6, 8  # of queries, and features of each


def turned(x: Tensor) -> Tensor:
    """Rotary embedding, halves of a head paired."""
    t, d = x.shape[-2:]
    angles = torch.arange(t, dtype=x.dtype)[:, None] * 0.5 ** torch.arange(d // 2, dtype=x.dtype)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    """Causal attention with rotary embeddings, several query heads to each of keys and values, in several spellings."""

    def __init__(self, kv_heads: int = 2, *, bias: bool = False, fused: bool = True, grouped: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * HEAD, bias=bias) for _ in range(2))
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=bias)
        self.kv_heads, self.fused, self.grouped = kv_heads, fused, grouped

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = turned(q), turned(k)
        if not self.grouped:
            shape = (b, self.kv_heads, HEADS // self.kv_heads, t, HEAD)
            k, v = (z[:, :, None].expand(shape).reshape(b, HEADS, t, HEAD) for z in (k, v))
        mask = torch.full((t, t), float("-inf"), dtype=x.dtype).triu(1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.grouped)
        else:
            y = (q @ k.transpose(2, 3) * HEAD**-0.5 + mask).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).reshape(b, t, HEADS * HEAD))


class PackedAttention(nn.Module):
    """Queries, keys and values in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, HEADS, HEAD).transpose(1, 2) for z in self.qkv(x).split(HEADS * HEAD, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))
