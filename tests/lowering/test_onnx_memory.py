"""What looks at memory, or at complex numbers, as ONNX."""

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.patterns.errors import TargetError
from tests.helpers import assert_close

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Overlapping(nn.Module):
    """Chunks of six that overlap by three, as sliding windows of attention are cut: along time, however that lies in memory."""

    def __init__(self, turned: bool, features: int = 8) -> None:
        super().__init__()
        self.turned, self.linear = turned, nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)  # (time, batch, features), or (batch, time, features)
        y = y.transpose(0, 1) if self.turned else y
        y = y.view(y.shape[0], y.shape[1] // 6, 6, y.shape[2])
        size, stride = list(y.shape), list(y.stride())
        size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
        return y.as_strided(size, stride)


@pytest.mark.parametrize("turned", [False, True])
def test_windows_by_strides_follow_memory(turned: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 8) if turned else torch.randn(3, 12, 8)
    model = Overlapping(turned).eval()
    artifact = recast.lower(recast.capture(model, (x,), dynamic_shapes=(None,)), "onnx")
    for other in (x, torch.randn_like(x)):
        y = nn.functional.linear(other.double(), model.linear.weight.double(), model.linear.bias.double()).detach()
        y = y.transpose(0, 1) if turned else y
        expected = torch.stack([y[:, 3 * i : 3 * i + 6] for i in range(3)], 1)
        assert_close(artifact(other), expected, terms=8)


def test_a_part_of_memory_is_refused() -> None:
    class Beside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2)[:, 1:3].as_strided((4, 3), (5, 1))  # the last column lies beside the part

    program = recast.capture(Beside().eval(), (torch.randn(4, 5),), dynamic_shapes=(None,))
    with pytest.raises(TargetError, match=r"as_strided.*contiguous\(\)"):
        recast.lower(program, "onnx")


def test_a_rotation_in_complex_numbers() -> None:
    class Rotated(nn.Module):
        def forward(self, x: Tensor, angle: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            turn = torch.polar(torch.ones_like(angle), angle)
            return torch.view_as_real(pairs * turn.unsqueeze(-2)[None]).flatten(3)

    x, angle = torch.randn(2, 7, 3, 8), torch.randn(7, 4)
    artifact = recast.lower(recast.capture(Rotated().eval(), (x, angle)), "onnx")
    x, angle = torch.randn(3, 7, 3, 8), torch.randn(7, 4)
    a, b = x.double()[..., ::2], x.double()[..., 1::2]
    cos, sin = angle.double().cos()[:, None], angle.double().sin()[:, None]
    expected = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)
    assert_close(artifact(x, angle), expected, terms=2)
