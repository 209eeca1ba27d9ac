"""LayerNorm turned into RMSNorm by centring what writes to the residual stream; every precondition broken once."""

import pytest
import torch
from torch import Tensor, nn

from tests.exact import done, golden, randomise, reasons, simplified

WIDTH = 6


class Block(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=case != "no_bias")
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH, bias=False)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n = self.one(x)
        q, k, v = (p(n).view(*x.shape[:2], 2, 3).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.o(y.transpose(1, 2).reshape(x.shape))
        x = x + (y * self.gamma if self.case == "layer_scale" else y)
        y = self.down(torch.relu(self.up(self.two(x))))
        return x + (torch.relu(y) if self.case == "activation" else y)


class Text(nn.Module):
    def __init__(self, case: str = "") -> None:
        super().__init__()
        self.case = case
        self.words, self.places = nn.Embedding(9, WIDTH), nn.Embedding(8, WIDTH)
        self.start = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList([Block(case), Block("")])
        self.end, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9)

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        if self.case == "embedding_norm":
            x = self.start(x)
        if self.case == "scaled":
            x = x * 2.5
        for block in self.blocks:
            x = block(x)
        n = self.end(x)
        y = n @ self.words.weight.T if self.case == "tied" else self.head(n)
        return (y, x) if self.case == "tapped" else y


def ids() -> list[tuple[Tensor, ...]]:
    return [(torch.randint(0, 9, shape),) for shape in ((2, 3), (1, 3), (3, 6), (2, 2))]


@pytest.mark.parametrize("case", ["", "no_bias", "scaled"])
def test_a_whole_stream(case: str, accept: bool) -> None:
    before, after = simplified(randomise(Text(case)), ids(), "layer_norm_to_rms_norm")
    assert len(done(after)) == 1
    assert "layer_norm(" not in str(after)
    if not case:
        golden("layer_norm_to_rms_norm", before, after, accept)
    for name in ("words.weight", "places.weight"):
        mean = after.weights[name].mean(-1)
        assert float(mean.abs().max()) < 1e-14


def test_with_scales_folded_first() -> None:
    _, after = simplified(randomise(Text()), ids(), "fold_norm_scale,layer_norm_to_rms_norm")
    assert "layer_norm(" not in str(after)
    assert "end.weight" not in after.weights
    assert set(after.successors_of("blocks.0.o.weight")) == {"blocks.0.o.weight"}


REASONS = {
    "layer_scale": "'mul",
    "activation": "is no linear, embedding, convolution or constant",
    "embedding_norm": "(post-norm), whose mean is not zero",
    "tapped": "of the residual stream back as a result",
    "tied": "is also read by",
}


@pytest.mark.parametrize("case", REASONS)
def test_refused(case: str) -> None:
    _, after = simplified(randomise(Text(case)), ids(), "layer_norm_to_rms_norm")
    assert REASONS[case] in reasons(after)
    if case == "embedding_norm":  # its own operand is a stream, and a good one
        assert len(done(after)) == 1
        assert str(after).count(" layer_norm(") == 5
    else:
        assert not done(after)


class Image(nn.Module):
    """Patches by convolution, a class token joined, a position for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.token, self.places = nn.Parameter(torch.ones(1, 1, WIDTH)), nn.Parameter(torch.ones(1, 7, WIDTH))
        self.block, self.end, self.head = Block(""), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.places
        return self.head(self.end(self.block(y)[:, 0]))


def test_patches_of_an_image() -> None:
    """Six patches of six features: sizes alone do not tell them apart."""
    given = [(torch.randn(b, 3, 4, 6, dtype=torch.float64),) for b in (2, 1, 3)]
    _, after = simplified(randomise(Image()), given, "layer_norm_to_rms_norm")
    assert len(done(after)) == 1
    assert "layer_norm(" not in str(after)


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def test_a_stream_that_is_an_input() -> None:
    _, after = simplified(randomise(Given()), [(torch.randn(2, 3, 6, dtype=torch.float64),)], "layer_norm_to_rms_norm")
    assert not done(after)
    assert "begins with the input 'x'" in reasons(after)


def test_raised_norms() -> None:
    _, after = simplified(randomise(Text()), ids(), "raise_structures{kinds=norm},layer_norm_to_rms_norm")
    assert len([text for text in done(after) if text.endswith("centred")]) == 1
    assert "layer_norm(" not in str(after)
