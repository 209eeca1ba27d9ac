"""Batch norms with fixed statistics folded into what comes before."""

import pytest
import torch
from torch import Tensor, nn

import recast
from tests.exact import done, golden, randomise, reasons, simplified


def image(channels: int = 3) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(b, channels, h, w, dtype=torch.float64),) for b, h, w in ((2, 7, 5), (1, 7, 5), (3, 7, 5))]


CONVOLUTIONS = {
    "conv": nn.Conv2d(3, 6, 3, padding=1),
    "conv_without_bias": nn.Conv2d(3, 6, 3, stride=2, bias=False),
    "grouped": nn.Conv2d(3, 6, 2, groups=3),
    "dilated_same": nn.Conv2d(3, 6, 3, padding="same", dilation=2),
    "transposed": nn.ConvTranspose2d(3, 6, 3, stride=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, accept: bool) -> None:
    model = nn.Sequential(CONVOLUTIONS[name], nn.BatchNorm2d(6), nn.ReLU())
    before, after = simplified(randomise(model), image(), "fold_batch_norm")
    assert done(after) == ["1 -> 0"]
    assert set(after.weights) == {"0.weight", "0.bias"}
    assert after.successors_of("1.running_var") == ("0.weight", "0.bias")
    if name == "conv":
        golden("fold_batch_norm_conv", before, after, accept)


def test_after_raising() -> None:
    """A batch norm of the dialect is folded as one of torch is."""
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8))
    given = [(torch.randn(n, 8, 6, dtype=torch.float64),) for n in (2, 1, 3)]
    _, after = simplified(randomise(model), given, "raise_structures,fold_batch_norm")
    assert done(after) == ["1 norm", "1 -> 0"]
    assert set(after.weights) == {"0.weight", "0.bias"}


def test_refused_after_raising() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8))
    given = [(torch.randn(n, 8, 6, dtype=torch.float64),) for n in (2, 1, 3)]
    _, after = simplified(randomise(model), given, "raise_structures,fold_batch_norm")
    assert done(after) == ["1 norm"]
    assert "its operand 'relu' is no convolution or linear" in reasons(after)


def test_linear() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    given = [(torch.randn(n, 5, dtype=torch.float64),) for n in (4, 1, 3)]
    _, after = simplified(randomise(model), given, "fold_batch_norm")
    assert done(after) == ["1 -> 0"]


def test_tokens_are_not_features() -> None:
    """Four tokens of four features: batch norm goes over tokens, the linear's rows are features."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    _, after = simplified(randomise(model), [(torch.randn(2, 4, 5, dtype=torch.float64),)], "fold_batch_norm")
    assert not done(after)
    assert "it normalises dimension 1, the features of 'linear' lie in the last one" in reasons(after)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y + self.norm(x)


def test_refused_with_reasons() -> None:
    _, after = simplified(randomise(Branch()), image(), "fold_batch_norm")
    assert not done(after)
    assert "also reads 'conv2d'" in reasons(after)


def test_training_statistics_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    program = recast.simplify(recast.capture(model, (torch.randn(2, 3, 7, 5),)), "fold_batch_norm")
    assert not done(program)
    assert "by the statistics of each batch" in reasons(program)
