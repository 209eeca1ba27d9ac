"""The meaning of a product of eight-bit numbers, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.reference import integer_matmul

__all__ = ["eight_bit_matmul"]


def eight_bit_matmul(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply vectors by a weight of the same eight-bit format and scale each output.

    Parameters
    ----------
    codes
        (tokens, n), int8 or float8_e4m3fn.
    weight
        (m, n), of the same dtype.
    scale
        (m,), floating.

    Returns
    -------
    (tokens, m) float32 (float64 with such scales), ``scale[r] sum_k codes[t, k] weight[r, k]``; integers are added up exactly.

    Examples
    --------
    >>> codes, weight = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, -4]], dtype=torch.int8)
    >>> eight_bit_matmul(codes, weight, torch.tensor([0.5])).tolist()
    [[-2.5]]
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    if codes.dtype == torch.int8:
        return integer_matmul(codes, weight).to(wide) * scale.to(wide)
    return torch.nn.functional.linear(codes.to(wide), weight.to(wide)) * scale.to(wide)
