"""`recast::sparse24_codes_matmul`: codes of a 2:4 weight in lane order times floating activations, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, elsewhere plain torch, which writes the weight out. The tile
is chosen by the number of tokens when it runs, so no graph is compiled again for another number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.sparse24_codes_matmul.lanes import from_lanes
from recast.kernels.sparse24_codes_matmul.launch import launch
from recast.kernels.tiles import interpreting

__all__ = ["sparse24_codes_matmul", "written_out"]


def written_out(
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    table: Tensor | None,
    *,
    bits: int,
    group: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight (m, features) that 2:4 codes in lane order stand for, in `dtype`, computed in float32 or wider.

    Parameters are those of `sparse24_codes_matmul`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    middle = 0 if table is not None else 2 ** (bits - 1)
    codes = from_lanes(values, places, bits, middle, features)
    weight = codes.to(wide) - middle if table is None else table.to(wide)[codes.to(torch.int64)]
    if scale is not None:
        of = torch.arange(features, device=scale.device) // (group or features)
        weight = weight * scale.T.index_select(1, of).to(wide)
    return weight.to(dtype)


@torch.library.custom_op("recast::sparse24_codes_matmul", mutates_args=())
def sparse24_codes_matmul(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    table: Tensor | None,
    pairs: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    few: int = -1,
) -> Tensor:
    """Multiply vectors by a 2:4 weight whose kept values are codes, ``x Wᵀ + bias``.

    Parameters
    ----------
    x
        (..., n), float32, float16 or bfloat16.
    values, places
        int32 (m, words) in lane order (`lanes.to_lanes`).
    scale
        (groups, m) or None.
    table, pairs
        (2^bits,) floating, its first entry zero; and, for 16-bit tables of four bits, `pairs_of` it, which serves vectors of that
        dtype with half the look-ups. Or None: codes are integers from ``-2^(bits - 1)`` on.
    bias
        (m,) or None.
    bits, group
        4 or 8; inputs in a group (twice its values), a multiple of 16, 0 for all of a row.
    few
        The most vectors for which the kernel runs, -1 for any number; for more the weight is written out and the library multiplies.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x and the bias; the weight is a constant.

    Examples
    --------
    >>> from recast.kernels.sparse24_codes_matmul.lanes import to_lanes
    >>> words, marks = to_lanes(torch.tensor([[9, 6]]), torch.tensor([[1, 3]]), 4, 8)  # 0 1 0 -2
    >>> x, scale = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0]])
    >>> sparse24_codes_matmul(x, words, marks, scale, None, None, None, 4, 0).tolist()
    [[-60.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    kernel = x.device.type == "cuda" or (interpreting() and x.dtype != torch.float64)
    if kernel and (few == -1 or flat.shape[0] <= few):
        paired = pairs is not None and table is not None and table.dtype == x.dtype
        y = launch(
            flat, values, places, scale, pairs if paired else table, bias,
            bits=bits, group=group, kind="pairs" if paired else "integer" if table is None else "table",
        )  # fmt: skip
    else:
        weight = written_out(values, places, scale, table, bits=bits, group=group, features=x.shape[-1], dtype=x.dtype)
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], values.shape[0])


@sparse24_codes_matmul.register_fake
def _(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, _, bias, bits, group, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.features, ctx.bias_dtype, ctx.settings = x.shape[-1], None if bias is None else bias.dtype, (bits, group)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    bits, group = ctx.settings
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ written_out(
            *ctx.saved_tensors, bits=bits, group=group, features=ctx.features, dtype=gradient.dtype
        )
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, None, None, None, None, None, to_bias, None, None, None


sparse24_codes_matmul.register_autograd(_gradients, setup_context=_keep)
