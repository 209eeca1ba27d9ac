"""Products of eight-bit numbers by the machine's matrix library: `torch._int_mm` and `torch._scaled_mm`, where they take the shape."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eight_bit_matmul", "serves"]


def serves(codes: Tensor, weight: Tensor) -> bool:
    """Whether the library multiplies vectors (tokens, n) by such a weight (m, n).

    cuBLASLt takes rows of a multiple of 16 bytes, and integers from 17 vectors on.

    Examples
    --------
    >>> codes = torch.zeros(32, 64, dtype=torch.int8)
    >>> serves(codes, codes), serves(codes[:, :60], codes[:, :60])
    (True, False)
    """
    if codes.shape[1] % 16 or weight.shape[0] % 16:
        return False
    return codes.shape[0] > 16 or codes.dtype != torch.int8


def eight_bit_matmul(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply as `reference.eight_bit_matmul` does.

    Examples
    --------
    >>> codes = torch.ones(32, 16, dtype=torch.int8)
    >>> eight_bit_matmul(codes, codes, torch.full((32,), 0.5))[0, :2].tolist()
    [8.0, 8.0]
    """
    if codes.dtype == torch.int8:
        return torch._int_mm(codes.contiguous(), weight.T).to(torch.float32) * scale
    one = scale.new_ones(())
    # Sums in full precision: the fast accumulation of sm_90 keeps 14 bits of them.
    found = torch._scaled_mm(codes.contiguous(), weight.T, one, one, out_dtype=torch.float32, use_fast_accum=False)
    return found * scale
