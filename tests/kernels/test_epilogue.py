"""What follows a product in its kernel, against float64: on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul.eight_bit_op import eight_bit_matmul
from recast.kernels.epilogue.launch import finish
from recast.kernels.epilogue.reference import ACTIVATIONS, Epilogue, backward, finished, in_turns, taken_apart
from recast.kernels.low_rank_matmul.low_rank_op import low_rank_matmul
from recast.kernels.quantized_matmul.dequantizing_op import dequantizing_matmul
from recast.kernels.quantized_matmul.lanes import to_lanes
from recast.kernels.quantized_matmul.launch import launch
from recast.kernels.tiles import Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What models have: an activation, a residual, an activation times a factor, a gate.
COMBINED = [
    ("gelu", False, ""),
    ("", False, "residual"),
    ("silu", False, "both"),
    ("silu", True, ""),
    ("", True, "residual"),
]


def meant(z: Tensor, activation: str, *, gated: bool = False, **also: Tensor | None) -> Tensor:
    """The definition, in float64, without what is tested."""
    spelled = {
        "": lambda v: v,
        "relu": lambda v: v.clamp_min(0),
        "relu2": lambda v: v.clamp_min(0) ** 2,
        "gelu": lambda v: v * (1 + torch.erf(v / 2**0.5)) / 2,
        "gelu_tanh": lambda v: v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))) / 2,
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "quick_gelu": lambda v: v / (1 + torch.exp(-1.702 * v)),
        "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
        "tanh": torch.tanh,
    }[activation]
    if gated:
        rows = torch.arange(z.shape[1]).reshape(-1, 2, 8)
        y = spelled(z[:, rows[:, 0].flatten()]) * z[:, rows[:, 1].flatten()]
    else:
        y = spelled(z)
    factor, residual = also.get("factor"), also.get("residual")
    y = y if factor is None else y * factor.double()
    return y if residual is None else y + residual.double()


def beside(tokens: int, outputs: int, has: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is multiplied with and added, each between NaN."""
    found = {}
    for name in ("factor", "residual"):
        if has in (name, "both"):
            around = torch.full((tokens, outputs + 2), float("nan"), dtype=dtype, device=DEVICE)
            around[:, 1:-1] = torch.randn(tokens, outputs).to(dtype)
            found[name] = around[:, 1:-1]
    return found


def coded(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of four bits in lane order, a scale for each row, and the weight in float64."""
    codes = torch.randint(0, 16, (m, n))
    scale = (torch.rand(1, m) + 0.5) / (4 * n**0.5)
    words, _ = to_lanes(codes, 4)
    return words.to(DEVICE), scale.to(DEVICE), ((codes - 8).double() * scale.double().T).to(DEVICE)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_sums_in_memory(activation: str, splits: int) -> None:
    sums = torch.randn(splits, 5, 32, device=DEVICE)
    for gated, outputs in ((False, 32), (True, 16)):
        given = {name: t.contiguous() for name, t in beside(5, outputs, "both", torch.float32).items()}
        out = torch.empty(5, outputs, device=DEVICE)
        finish(sums, out, Epilogue(activation, gated, **given))
        assert_close(out, meant(sums.double().sum(0), activation, gated=gated, **given), terms=splits)


# The interpreter warns where an exponential is too large.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_and_no_numbers(activation: str) -> None:
    z = torch.tensor([[-1e4, -80.0, -0.0, 80.0, 1e4, float("nan")]], device=DEVICE)
    out = finish(z, torch.empty_like(z), Epilogue(activation))
    wanted = meant(z[:, :-1].double(), activation)
    assert bool(out[0, -1].isnan())
    for at in range(5):  # each for itself: one is much larger than the others
        assert_close(out[:, at : at + 1] + 1, wanted[:, at : at + 1] + 1)  # some are below what float32 has


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("activation", "gated", "has"), COMBINED)
@pytest.mark.parametrize("splits", [1, 2])
def test_kernel_of_codes(dtype: torch.dtype, activation: str, gated: bool, has: str, splits: int) -> None:
    m, n, tokens = 48 if gated else 63, 300, 5
    words, scale, weight = coded(m, n)
    x, bias = torch.randn(tokens, n, device=DEVICE).to(dtype), torch.randn(m, device=DEVICE).to(dtype)
    given = {k: t.contiguous() for k, t in beside(tokens, m // 2 if gated else m, has, dtype).items()}
    y = launch(
        x, words, None, scale, None, None, bias, None, None, bits=4, group=0, kind="integer",
        epilogue=Epilogue(activation, gated, **given), tile=Tile(16, 16, 1), splits=splits,
    )  # fmt: skip
    assert y.dtype == dtype
    assert_close(y, meant(x.double() @ weight.T + bias.double(), activation, gated=gated, **given), terms=n)


@pytest.mark.parametrize("few", [0, 1])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 3)])
@pytest.mark.parametrize(("activation", "gated", "has"), COMBINED)
def test_operation_of_codes(tokens: tuple[int, ...], few: int, activation: str, gated: bool, has: str) -> None:
    words, scale, weight = coded(48, 63)
    x, bias = torch.randn(*tokens, 63, device=DEVICE), torch.randn(48, device=DEVICE)
    flat = x.reshape(-1, 63)
    given = beside(len(flat), 24 if gated else 48, has, x.dtype)
    shaped = [given[k].reshape(*tokens, given[k].shape[1]) if k in given else None for k in ("factor", "residual")]
    parts = words, None, scale, None, None, None, bias, None, None
    y = dequantizing_matmul(x, *parts, 4, 0, "integer", few, activation, gated, *shaped)
    assert y.shape == (*tokens, 24 if gated else 48)
    wanted = meant(flat.double() @ weight.T + bias.double(), activation, gated=gated, **given)
    assert_close(y.reshape(wanted.shape), wanted, terms=63)


@pytest.mark.parametrize("few", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("activation", "has"), [(a, has) for a, gated, has in COMBINED if not gated])
def test_operation_of_low_rank(few: int, dtype: torch.dtype, activation: str, has: str) -> None:
    left, right = torch.randn(33, 5, device=DEVICE).to(dtype), torch.randn(5, 60, device=DEVICE).to(dtype)
    x, bias = (torch.randn(7, 60, device=DEVICE) / 8).to(dtype), torch.randn(33, device=DEVICE).to(dtype)
    given = beside(7, 33, has, dtype)
    y = low_rank_matmul(x, left, right, bias, few, activation, **given)
    z = x.double() @ right.double().T @ left.double().T + bias.double()
    assert_close(y, meant(z, activation, **given), terms=65)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rounded", "splits"),
    [("by token", 1), ("by token", 3), ("by token", 0), ("all alike", 1), ("all alike", 0), ("without zero", 1)],
)
@pytest.mark.parametrize(("activation", "gated", "has"), COMBINED[2:])
def test_operation_of_eight_bits(
    dtype: torch.dtype,
    rounded: str,
    splits: int,
    activation: str,
    gated: bool,
    has: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from recast.kernels.eight_bit_matmul import launch as launching
    from recast.kernels.eight_bit_matmul import library, reference

    if not splits:  # many tokens, as a library's product leaves them
        monkeypatch.setattr(library, "serves", lambda *_: True)
        monkeypatch.setattr(library, "eight_bit_matmul", reference.eight_bit_matmul)
    cut = launching.cut
    monkeypatch.setattr(launching, "cut", lambda x, rows, pieces, tile, _: cut(x, rows, pieces, tile, splits))
    codes, weight = (torch.randint(-128, 128, (n, 577), dtype=torch.int8, device=DEVICE) for n in (5, 48))
    scale = (torch.rand(48, device=DEVICE) + 0.5) / 2**14
    count = 1 if rounded == "all alike" else 5
    step, zero = torch.rand(count, 1, device=DEVICE), torch.randint(-9, 9, (count, 1), device=DEVICE).float()
    offset = weight.sum(1).float() * scale
    bias = torch.randn(48, device=DEVICE).to(dtype)
    given = beside(5, 24 if gated else 48, has, dtype)
    shifts = (None, None) if rounded == "without zero" else (zero, offset)
    y = eight_bit_matmul(
        codes, weight, scale, -1 if splits else 0, step, *shifts, dtype, bias, activation, gated, **given
    )
    whole = codes.double() - (0 if rounded == "without zero" else zero.double())
    z = step.double() * (whole @ weight.double().T) * scale.double() + bias.double()
    assert y.dtype == dtype
    assert_close(y, meant(z, activation, gated=gated, **given), terms=577)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_gradients_are_those_of_the_reference(activation: str, gated: bool) -> None:
    z = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(3, 16 if gated else 32, dtype=torch.float64, requires_grad=True)
    epilogue = Epilogue(activation, gated, factor, torch.randn_like(factor))
    y = finished(z, epilogue)
    gradient = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (z, factor), gradient)
    for one, other in zip(backward(gradient, z.detach(), epilogue), wanted, strict=True):
        assert one is not None
        assert_close(one, other)


def test_gradients_of_operations() -> None:
    def wide(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    words, scale, _ = (t.cpu() for t in coded(16, 32))
    x, bias, factor, residual = wide(2, 32), wide(16), wide(2, 8), wide(2, 8)
    assert torch.autograd.gradcheck(
        lambda x, bias, *also: dequantizing_matmul(
            x, words, None, scale.double(), None, None, None, bias, None, None, 4, 0, "integer", 0, "silu", True, *also
        ),
        (x, bias, factor, residual),
    )
    left, right, factor, residual = wide(5, 3), wide(3, 32), wide(2, 5), wide(2, 5)
    assert torch.autograd.gradcheck(
        lambda x, left, right, *also: low_rank_matmul(x, left, right, None, None, "gelu", *also),
        (x, left, right, factor, residual),
    )


def test_gradients_of_eight_bits() -> None:
    codes, weight = (torch.randint(-9, 9, (n, 20), dtype=torch.int8, device=DEVICE) for n in (3, 16))
    scale, offset = torch.rand(16, device=DEVICE) / 64, torch.randn(16, device=DEVICE)
    sizes = ((3, 1), (3, 1), (16,), (3, 16), (3, 16))
    operands = [torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes]
    step, zero, bias, factor, residual = operands
    y = eight_bit_matmul(
        codes, weight, scale, -1, step, zero, offset, torch.float32, bias, "tanh", False, factor, residual
    )
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, operands, gradient)
    wide = [t.detach().double().requires_grad_() for t in operands]
    sums = codes.double() @ weight.double().T * scale.double() - wide[1] * offset.double()
    wanted = torch.autograd.grad(meant(sums * wide[0] + wide[2], "tanh") * wide[3] + wide[4], wide, gradient.double())
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, terms=60)


def test_operations_for_compilers() -> None:
    words, scale, _ = coded(16, 32)
    x = torch.randn(3, 32, device=DEVICE, requires_grad=True)
    also = torch.randn(3, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    given = x, words, None, scale, None, None, None, None, None, None, 4, 0, "integer", 0, "silu", True, *also
    torch.library.opcheck(dequantizing_matmul, given, test_utils=checks)
    codes = torch.ones(3, 32, dtype=torch.int8, device=DEVICE)
    given = codes, codes, torch.ones(3, device=DEVICE), -1, torch.ones(3, 1, device=DEVICE), None, None, torch.bfloat16
    torch.library.opcheck(eight_bit_matmul, given, test_utils=checks)


def test_rows_in_turns_and_unknown_activations() -> None:
    gate, up = torch.randn(2, 3, 24).unbind(0)
    for one, other in zip(taken_apart(in_turns(gate, up, 1)), (gate, up), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="no activation 'mish'; there are relu"):
        Epilogue.of("mish", False, None, None)
