"""Biases of keys and values: what softmax cancels goes, what it averages moves."""

import pytest
import torch
from torch import Tensor, nn

from tests.exact import done, golden, randomise, reasons, simplified

SHAPES = [(2, 3), (1, 3), (3, 5), (2, 1)]


def inputs(width: int = 12) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(*shape, width, dtype=torch.float64),) for shape in SHAPES]


class Attention(nn.Module):
    def __init__(self, kind: str = "fused", packed: bool = False, groups: int = 1, rotary: bool = False) -> None:
        super().__init__()
        self.kind, self.packed, self.rotary, self.heads = kind, packed, rotary, 3 if groups == 1 else 4
        width = 4 * self.heads
        self.width, self.narrow = width, width // groups
        if packed:
            self.qkv = nn.Linear(12, width + 2 * self.narrow)
        else:
            self.q, self.k, self.v = nn.Linear(12, width), nn.Linear(12, self.narrow), nn.Linear(12, self.narrow)
        self.o = nn.Linear(width, 12)
        self.sink = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.packed:
            parts = self.qkv(x).split([self.width, self.narrow, self.narrow], -1)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(b, t, -1, 4).transpose(1, 2) for p in parts)
        if self.rotary:
            k = k * torch.arange(1.0, 2.0, 0.25, dtype=k.dtype).cos()
        sdpa = nn.functional.scaled_dot_product_attention
        if self.kind == "fused":
            y = sdpa(q, k, v, is_causal=True)
        elif self.kind == "grouped":
            y = sdpa(q, k, v, enable_gqa=True)
        elif self.kind == "masked":
            y = sdpa(q, k, v, attn_mask=x[:, None, None, :, 0] > -9.0)
        elif self.kind == "repeated":
            k, v = (p[:, :, None].expand(b, p.shape[1], 2, t, 4).reshape(b, 4, t, 4) for p in (k, v))
            y = torch.softmax(q @ k.transpose(-1, -2) * 0.5 + torch.ones(t, t, dtype=x.dtype).tril().log(), -1) @ v
        elif self.kind == "sigmoid":
            y = torch.sigmoid(q @ k.transpose(-1, -2)) @ v
        elif self.kind == "sink":
            s = q @ k.transpose(-1, -2)
            s = torch.cat([s, self.sink.expand(b, self.heads, t, 1)], -1)
            y = torch.softmax(s, -1)[..., :-1] @ v
        else:
            y = torch.softmax(torch.tanh(q @ k.transpose(-1, -2)), -1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, self.width))


BOTH = {
    "fused": Attention(),
    "packed": Attention(packed=True),
    "grouped": Attention("grouped", groups=2),
    "repeated": Attention("repeated", groups=2),
    "packed_repeated": Attention("repeated", packed=True, groups=2),
}


@pytest.mark.parametrize("name", BOTH)
def test_keys_and_values(name: str, accept: bool) -> None:
    before, after = simplified(randomise(BOTH[name]), inputs(), "drop_softmax_constant")
    assert len(done(after)) == 2
    if "packed" not in name:
        assert set(before.weights) - set(after.weights) == {"k.bias", "v.bias"}
        assert "bias of the keys dropped" in after.dropped["k.bias"]
        assert after.successors_of("v.bias") == ("o.bias",)
    if name in ("fused", "packed"):
        golden(f"drop_softmax_constant_{name}", before, after, accept)


@pytest.mark.parametrize("kind", ["sigmoid", "sink", "softcap"])
def test_another_normaliser_keeps_both(kind: str) -> None:
    _, after = simplified(randomise(Attention(kind)), inputs(), "drop_softmax_constant")
    assert not done(after)


def test_what_stands_between_keeps_the_keys_bias() -> None:
    _, after = simplified(randomise(Attention(rotary=True)), inputs(), "drop_softmax_constant")
    assert done(after) == ["v: bias of the values -> o"]
    assert "stands between them and their linear" in reasons(after)


def test_a_mask_keeps_the_values_bias_unless_allowed() -> None:
    _, after = simplified(randomise(Attention("masked")), inputs(), "drop_softmax_constant")
    assert done(after) == ["k: bias of the keys dropped"]
    assert "full_rows=True" in reasons(after)
    _, after = simplified(randomise(Attention("masked")), inputs(), "drop_softmax_constant{full_rows=True}")
    assert len(done(after)) == 2


class Cached(Attention):
    """Keys and values are results too: a cache that others will read."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v = (p(x).view(*x.shape[:2], 3, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], 12)), k, v


def test_a_cache_keeps_both() -> None:
    _, after = simplified(randomise(Cached()), inputs(), "drop_softmax_constant")
    assert not done(after)
    assert "'output' reads its keys before the scores do" in reasons(after)
    assert "'output' reads its values too" in reasons(after)


@pytest.mark.parametrize("name", BOTH)
def test_raised_attention(name: str) -> None:
    _, after = simplified(randomise(BOTH[name]), inputs(), "raise_structures{kinds=attention},drop_softmax_constant")
    assert len([text for text in done(after) if "bias of the" in text]) == 2
