"""Matrices of codes side by side, as the kernel of packed codes takes one matrix: a combination of them is one product.

``(sum_s c_s D_s) x = [D_1 ... D_S] [c_1 x; ...; c_S x]``: codes and scales are the same whatever the coefficients, so that layers which
share the matrices share them here as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.lanes import block_of, to_lanes

__all__ = ["combined", "repeated", "stack", "width_of"]


def width_of(features: int, bits: int, group: int) -> int:
    """Return the inputs that each matrix is filled up to: whole blocks of codes and whole groups.

    Examples
    --------
    >>> width_of(4096, 4, 128), width_of(60, 4, 16), width_of(60, 4, 0), width_of(300, 4, 48)
    (4096, 128, 128, 384)
    """
    whole = math.lcm(block_of(bits), group) if group else block_of(bits)
    return -(-features // whole) * whole


def stack(
    codes: Sequence[Tensor], scales: Sequence[Tensor | None], zeros: Sequence[Tensor | None], bits: int, group: int
) -> tuple[dict[str, Tensor], int]:
    """Lay matrices out side by side.

    Parameters
    ----------
    codes
        Of each (m, n), from zero on.
    scales, zeros
        Of each (groups, m), or all of them None.
    bits, group
        2, 3, 4 or 8; inputs of a group, 0 for all of a row.

    Returns
    -------
    held, group
        ``values``, ``high_values``, ``scale`` and ``zero``, as far as there are, as `dequantizing_matmul` takes them; and the inputs
        of a group there.
    """
    n = codes[0].shape[1]
    width = width_of(n, bits, group)
    words, high_words = to_lanes(
        torch.cat([torch.nn.functional.pad(c.to(torch.uint8), (0, width - n)) for c in codes], 1), bits
    )
    held = {"values": words} if high_words is None else {"values": words, "high_values": high_words}
    groups = width // group if group else 1
    for name, parts in (("scale", scales), ("zero", zeros)):
        given = [part for part in parts if part is not None]
        if given:
            # What fills a matrix up is multiplied by zeros: its scale is of no consequence but must be finite.
            held[name] = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, groups - len(p))) for p in given]).contiguous()
    return held, group or width


def repeated(x: Tensor, coefficients: Tensor, width: int) -> Tensor:
    """Return vectors (tokens, n) times each of s coefficients, side by side and filled up: (tokens, s width).

    Examples
    --------
    >>> repeated(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, -1.0]), 3).tolist()
    [[3.0, 6.0, 0.0, -1.0, -2.0, 0.0]]
    """
    found = x.new_zeros(x.shape[0], len(coefficients), width)
    torch.mul(x.unsqueeze(1), coefficients.to(x.dtype).unsqueeze(1), out=found[..., : x.shape[1]])
    return found.flatten(1)


def combined(whole: Tensor, coefficients: Tensor, features: int) -> Tensor:
    """Return ``sum_s c_s D_s`` (m, features) of matrices side by side, (m, s width), added up in float32 or wider.

    Examples
    --------
    >>> combined(torch.tensor([[1.0, 0.0, 5.0, 0.0]]), torch.tensor([2.0, 1.0]), 1).tolist()
    [[7.0]]
    """
    matrices = whole.reshape(whole.shape[0], len(coefficients), -1)[..., :features]
    wide = torch.promote_types(whole.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=whole.device)
    for i, one in enumerate(coefficients.to(wide).unbind(0)):
        total = total + one * matrices[:, i]
    return total.to(whole.dtype)
