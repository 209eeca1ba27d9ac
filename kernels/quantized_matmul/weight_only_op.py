"""`recast::weight_only_matmul`: packed weights times floating activations on a CPU, as one operation of a graph.

For few vectors the weight is decoded in registers; for many it is written out, some rows at a time, and multiplied by the
machine's matrix library, which is faster from some number on. That number is an operand: it is measured where a program is lowered.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from recast.kernels.quantized_matmul import few_tokens, rounded_tokens

__all__ = ["weight_only_matmul"]

_SLAB = 1 << 21  # numbers that are written out at a time: 8 MiB, which caches hold beside the vectors


@torch.library.custom_op("recast::weight_only_matmul", mutates_args=())
def weight_only_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    dense: Tensor | None,
    bits: int,
    few: int,
    rounded: bool = False,
) -> Tensor:
    """Multiply vectors by a packed weight, ``x Wᵀ``.

    Parameters
    ----------
    x
        (..., n), floating, on a CPU; multiplied in float32, or many bfloat16 vectors where the CPU multiplies such as they are.
    codes, scale, zero, table, bits
        As `few_tokens.few_tokens` takes them.
    dense
        (m, n), the weight written out, or None: then it is written out where it is needed.
    few
        The most vectors for which the weight is decoded in registers.
    rounded
        So few vectors are rounded to bytes first (`rounded_tokens`); there is no table then.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x; the weight is a constant.

    Examples
    --------
    >>> from recast.kernels.quantized_matmul.blocks import to_blocks
    >>> codes = to_blocks(torch.tensor([[9, 10, 7]]), 4, 0)  # 1, 2 and -1 from the middle
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> weight_only_matmul(x, codes, torch.full((1, 1), 0.5), None, None, None, 4, 8).tolist()
    [[1.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] <= few and rounded:
        y = rounded_tokens.rounded_tokens(flat.to(torch.float32), codes, scale, zero, bits=bits)
    elif flat.shape[0] <= few:
        y = few_tokens.few_tokens(flat.to(torch.float32), codes, scale, zero, table, bits=bits)
    elif dense is not None:
        y = torch.nn.functional.linear(flat.to(dense.dtype), dense)
    else:
        halves = flat.dtype == torch.bfloat16 and _multiplies_bfloat16()
        y = _many(flat if halves else flat.to(torch.float32), codes, scale, zero, table, bits)
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


def _slabs(codes: Tensor, features: int) -> list[range]:
    rows, step = codes.shape[0], max(1, _SLAB // max(1, features))
    return [range(at, min(at + step, rows)) for at in range(0, rows, step)]


def _many(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int) -> Tensor:
    y = x.new_empty((x.shape[0], codes.shape[0]))
    for rows in _slabs(codes, x.shape[1]):
        weight = few_tokens.write_out(
            codes, scale, zero, table, bits=bits, features=x.shape[1], rows=rows, dtype=x.dtype
        )
        torch.mm(x, weight.T, out=y[:, rows.start : rows.stop])
    return y


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without, it is several times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@weight_only_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    dense: Tensor | None,
    bits: int,
    few: int,
    rounded: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero, table, _, bits, _, _ = inputs
    ctx.save_for_backward(codes, scale, zero, table)
    ctx.bits, ctx.features = bits, x.shape[-1]


@torch.library.custom_op("recast::weight_only_matmul_backward", mutates_args=())
def _to_x(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int, features: int
) -> Tensor:
    """The gradient of x: ``g W``, (..., m) to (..., features)."""
    flat = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32)
    found = flat.new_zeros((flat.shape[0], features))
    for rows in _slabs(codes, features):
        weight = few_tokens.write_out(codes, scale, zero, table, bits=bits, features=features, rows=rows)
        found.addmm_(flat[:, rows.start : rows.stop], weight)
    return found.to(gradient.dtype).reshape(*gradient.shape[:-1], features)


@_to_x.register_fake
def _(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int, features: int
) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], features))


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x: Tensor = _to_x(gradient, *ctx.saved_tensors, ctx.bits, ctx.features)
    return to_x, *[None] * 8


weight_only_matmul.register_autograd(_gradients, setup_context=_keep)
