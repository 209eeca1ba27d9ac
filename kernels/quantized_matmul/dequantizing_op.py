"""`recast::dequantizing_matmul`: codes in lane order times floating activations, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, elsewhere plain torch, which writes the weight out. What
compilers see is one opaque operation: the tile is chosen by the number of tokens when it runs, so no graph is compiled again for
another number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.epilogue.launch import finish
from recast.kernels.epilogue.reference import Epilogue, backward, finished
from recast.kernels.quantized_matmul.lanes import from_lanes
from recast.kernels.quantized_matmul.launch import launch, write_out
from recast.kernels.tiles import interpreting

__all__ = ["dequantizing_matmul", "written_out"]


def written_out(
    values: Tensor,
    high_values: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    *,
    bits: int,
    group: int,
    kind: str,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight (m, features) that codes in lane order stand for, in `dtype`, computed in float32 or wider.

    Parameters are those of `dequantizing_matmul`.
    """
    codes = from_lanes(values, high_values, bits, features)
    wide = torch.promote_types(dtype, torch.float32)
    if kind == "table":
        assert table is not None  # `dequantizing_matmul` asks for it
        weight = table.to(wide)[codes.to(torch.int64)]
    elif kind == "float":
        weight = codes.view(torch.float8_e4m3fn).to(wide)
    else:
        middle = 2 ** (bits - 1) if zero is None or bits == 8 else 0
        weight = codes.to(wide) - middle
        if zero is not None:
            weight = weight - _spread(zero, features, group).to(wide)
    if scale is not None:
        weight = weight * _spread(scale, features, group).to(wide)
    return weight.to(dtype)


def _spread(per_group: Tensor, features: int, group: int) -> Tensor:
    if not group:
        return per_group.T
    return per_group.T.index_select(1, torch.arange(features, device=per_group.device) // group)


@torch.library.custom_op("recast::dequantizing_matmul", mutates_args=())
def dequantizing_matmul(
    x: Tensor,
    values: Tensor,
    high_values: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    pairs: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    bits: int,
    group: int,
    kind: str,
    few: int,
    activation: str = "",
    gated: bool = False,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply vectors by a weight of packed codes, ``f(x Wᵀ + (x rightᵀ) leftᵀ + bias) * factor + residual``.

    Parameters
    ----------
    x
        (..., n), float32, float16 or bfloat16.
    values, high_values
        int32 (m, words) in lane order (`lanes.to_lanes`); the second for three bits only.
    scale, zero
        (groups, m) or None; zero points as floating numbers.
    table, pairs
        (2^bits,) floating, for kind "table"; and, for 16-bit tables, `launch.pairs_of` it, which serves vectors of that dtype
        with half the look-ups. Or None.
    bias
        (m,) or None.
    left, right
        (m, rank) and (rank, n), or None: a low-rank term that costs no pass of its own over the outputs.
    bits, group, kind
        2, 3, 4 or 8; inputs in a group, a multiple of 16, 0 for all of a row; "integer", "table" or, for eight bits, "float"
        (e4m3).
    few
        The most vectors for which codes are decoded on their way to the matrix units; more than that are multiplied with the
        weight written out, by the matrix library. 0 or less: always decoded.
    activation, gated
        f, one of `recast.kernels.epilogue.reference.ACTIVATIONS` or "" for none; whether rows of a gate and of what it gates come in
        turns (`reference.in_turns`): then there are m / 2 outputs, f of the gate times the other.
    factor, residual
        As many as there are outputs, or None.

    Returns
    -------
    (..., m), or (..., m / 2), in x's dtype. Gradients reach x, bias, left, right, factor and residual; codes and scales are constants.

    Raises
    ------
    ValueError
        There is no such activation.

    Examples
    --------
    >>> from recast.kernels.quantized_matmul.lanes import to_lanes
    >>> codes = torch.tensor([[9, 7], [8, 15]])  # 1, -1 and 0, 7
    >>> words, _ = to_lanes(codes, 4)
    >>> scale = torch.tensor([[1.0, 2.0]])
    >>> x = torch.tensor([[3.0, 1.0]])
    >>> dequantizing_matmul(x, words, None, scale, None, None, None, None, None, None, 4, 0, "integer", 0).tolist()
    [[2.0, 14.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    epilogue = Epilogue.of(activation, gated, factor, residual)
    if x.device.type == "cuda" or (interpreting() and x.dtype != torch.float64):
        inner = None if right is None else torch.nn.functional.linear(flat, right.to(x.dtype))
        near = None if left is None else left.to(x.dtype).contiguous()
        paired = pairs is not None and table is not None and table.dtype == x.dtype
        operands = values, high_values, scale, zero, pairs if paired else table
        coded: dict[str, Any] = {"bits": bits, "group": group, "kind": "pairs" if paired else kind}
        if few <= 0 or flat.shape[0] <= few:
            y = launch(flat, *operands, bias, near, inner, **coded, epilogue=epilogue)
        else:
            weight = write_out(*operands, **coded, features=x.shape[-1], dtype=x.dtype)
            y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
            if near is not None and inner is not None:
                y = torch.addmm(y, inner, near.T)
            if not epilogue.empty:
                y = finish(y.contiguous(), y.new_empty((len(y), epilogue.outputs(y.shape[1]))), epilogue)
    else:
        weight = written_out(
            values, high_values, scale, zero, table,
            bits=bits, group=group, kind=kind, features=x.shape[-1], dtype=x.dtype,
        )  # fmt: skip
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
        if left is not None and right is not None:
            y = y + torch.nn.functional.linear(torch.nn.functional.linear(flat, right.to(x.dtype)), left.to(x.dtype))
        y = finished(y, epilogue)
    return y.reshape(*x.shape[:-1], epilogue.outputs(values.shape[0]))


@dequantizing_matmul.register_fake
def _(x: Tensor, values: Tensor, *rest: Any, activation: str = "", gated: bool = False, **more: Any) -> Tensor:
    gated = rest[13] if len(rest) > 13 else gated
    return x.new_empty((*x.shape[:-1], values.shape[0] // (2 if gated else 1)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10], *inputs[16:])
    ctx.settings = inputs[10:16]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *given, factor, residual = ctx.saved_tensors
    x, values, high_values, scale, zero, table, _, bias, left, right = given
    bits, group, kind, few, activation, gated = ctx.settings
    epilogue = Epilogue.of(activation, gated, factor, residual)
    flat, back = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    to_factor = to_residual = None
    if not epilogue.empty:
        to_residual = None if residual is None else gradient
        sums = dequantizing_matmul(*given, bits, group, kind, few)
        back, to_factor = backward(back, sums.reshape(-1, sums.shape[-1]), epilogue)
        to_factor = None if factor is None or to_factor is None else to_factor.reshape(factor.shape)
    to_x = to_bias = to_left = to_right = None
    if ctx.needs_input_grad[0]:
        weight = written_out(
            values, high_values, scale, zero, table,
            bits=bits, group=group, kind=kind, features=x.shape[-1], dtype=x.dtype,
        )  # fmt: skip
        to_x = back @ weight
        if left is not None:
            to_x = to_x + (back @ left.to(x.dtype)) @ right.to(x.dtype)
        to_x = to_x.reshape(x.shape)
    if bias is not None and ctx.needs_input_grad[7]:
        to_bias = back.sum(0).to(bias.dtype)
    if left is not None and ctx.needs_input_grad[8]:
        to_left = (back.T @ (flat @ right.to(x.dtype).T)).to(left.dtype)
    if right is not None and ctx.needs_input_grad[9]:
        to_right = ((back @ left.to(x.dtype)).T @ flat).to(right.dtype)
    return (to_x, *[None] * 6, to_bias, to_left, to_right, *[None] * 6, to_factor, to_residual)


dequantizing_matmul.register_autograd(_gradients, setup_context=_keep)
