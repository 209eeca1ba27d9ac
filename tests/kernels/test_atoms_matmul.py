"""Combinations of matrices of codes: side by side in the kernel of packed codes (interpreted without a GPU), and written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.atoms_matmul.atoms_op import atoms_matmul
from recast.kernels.atoms_matmul.stacked import stack, width_of
from recast.kernels.quantized_matmul.launch import pairs_of
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT, FEW = 3, 4


class Drawn:
    """Matrices of random codes, and what they stand for in float64."""

    def __init__(
        self, m: int, n: int, bits: int, group: int, *, zeros: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        # A dtype asks for a table of it.
        self.n, self.bits, self.width = n, bits, width_of(n, bits, group)
        codes = [torch.randint(0, 2**bits, (m, n), device=DEVICE) for _ in range(COUNT)]
        groups = -(-n // group) if group else 1
        scales = [torch.rand(groups, m, device=DEVICE) + 0.5 for _ in range(COUNT)]
        points = [torch.randint(0, 2**bits, (groups, m), device=DEVICE).float() for _ in range(COUNT)]
        self.held, self.group = stack(codes, scales, points if zeros else [None] * COUNT, bits, group)
        self.table = None if dtype is None else torch.randn(2**bits, device=DEVICE).to(dtype)
        of = torch.arange(n, device=DEVICE) // (group or n)
        self.matrices = []
        for code, scale, zero in zip(codes, scales, points, strict=True):
            middle = zero[of].T.double() if zeros else 2 ** (bits - 1)
            numbers = code.double() - middle if self.table is None else self.table.double()[code]
            self.matrices.append(numbers * scale[of].T.double())

    def operands(self, x: Tensor, coefficients: Tensor, few: int = FEW) -> tuple[object, ...]:
        parts = (self.held.get(name) for name in ("high_values", "scale", "zero"))
        half = self.table is not None and self.table.dtype != torch.float32 and self.bits < 8
        pairs = pairs_of(self.table) if half and self.table is not None else None
        kind = "integer" if self.table is None else "table"
        return (
            x, coefficients, self.held["values"], *parts, self.table, pairs,
            self.bits, self.group, kind, self.width, few,
        )  # fmt: skip

    def expected(self, x: Tensor, coefficients: Tensor) -> Tensor:
        weight = sum(c * matrix for c, matrix in zip(coefficients.double(), self.matrices, strict=True))
        return x.double() @ weight.T


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (FEW + 1,)], ids=str)
@pytest.mark.parametrize("group", [0, 16, 48])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_operation(bits: int, group: int, tokens: tuple[int, ...]) -> None:
    drawn = Drawn(11, 60, bits, group)
    x, coefficients = torch.randn(*tokens, 60, device=DEVICE), torch.randn(COUNT, device=DEVICE)
    y = atoms_matmul(*drawn.operands(x, coefficients))
    assert y.shape == (*tokens, 11)
    assert_close(y, drawn.expected(x, coefficients).reshape(y.shape), terms=60 * COUNT)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("kind", ["zeros", "table"])
def test_zero_points_and_tables_in_16_bits(kind: str, tokens: int) -> None:
    drawn = Drawn(11, 60, 4, 16, zeros=kind == "zeros", dtype=torch.bfloat16 if kind == "table" else None)
    x, coefficients = torch.randn(tokens, 60, device=DEVICE).bfloat16(), torch.randn(COUNT, device=DEVICE)
    assert_close(atoms_matmul(*drawn.operands(x, coefficients)), drawn.expected(x, coefficients), terms=60 * COUNT)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_vectors_between_nan(tokens: int) -> None:
    drawn = Drawn(11, 60, 4, 0)
    x = torch.full((tokens, 100), float("nan"), device=DEVICE)[:, 20:80]
    x.copy_(torch.randn(tokens, 60))
    coefficients = torch.randn(COUNT, device=DEVICE)
    assert_close(atoms_matmul(*drawn.operands(x, coefficients)), drawn.expected(x, coefficients), terms=60 * COUNT)


@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, tokens: int) -> None:
    drawn = Drawn(5, 20, 4, 16)
    x = torch.randn(tokens, 20, device=DEVICE).to(dtype).requires_grad_()
    coefficients = torch.randn(COUNT, device=DEVICE).to(dtype).requires_grad_()
    out = torch.randn(tokens, 5, device=DEVICE).to(dtype)
    found = torch.autograd.grad(atoms_matmul(*drawn.operands(x, coefficients)), (x, coefficients), out)
    wide = [t.detach().double().requires_grad_() for t in (x, coefficients)]
    wanted = torch.autograd.grad(drawn.expected(*wide), wide, out.double())
    assert_close(found[0], wanted[0], terms=5 * COUNT)
    assert_close(found[1], wanted[1], terms=5 * 20 * tokens)


def test_gradients_in_float64() -> None:
    drawn = Drawn(3, 5, 4, 0)
    x = torch.randn(2, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    coefficients = torch.randn(COUNT, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def run(x: Tensor, coefficients: Tensor) -> Tensor:
        y: Tensor = atoms_matmul(*drawn.operands(x, coefficients))
        return y

    # Scales are float32 numbers, taken as what they are.
    assert torch.autograd.gradcheck(run, (x, coefficients))


def test_operation_for_compilers() -> None:
    drawn = Drawn(5, 20, 3, 16)
    x = torch.randn(2, 20, device=DEVICE, requires_grad=True)
    coefficients = torch.randn(COUNT, device=DEVICE, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(atoms_matmul, drawn.operands(x, coefficients), test_utils=checks)
