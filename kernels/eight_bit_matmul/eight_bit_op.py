"""`recast::eight_bit_matmul`: eight-bit codes times an eight-bit weight, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, elsewhere plain torch. Rounding the inputs before it is plain
tensor code, which compilers fuse with their neighbours; what undoes that rounding after the product, and what follows, is done here
before sums are stored, so that they never stand in memory in 32 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul import library, reference
from recast.kernels.eight_bit_matmul.launch import launch
from recast.kernels.eight_bit_matmul.reference import Rounded, unrounded
from recast.kernels.epilogue.launch import finish
from recast.kernels.epilogue.reference import Epilogue, backward, finished
from recast.kernels.tiles import interpreting

__all__ = ["eight_bit_matmul"]


@torch.library.custom_op("recast::eight_bit_matmul", mutates_args=())
def eight_bit_matmul(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    few: int = -1,
    step: Tensor | None = None,
    zero: Tensor | None = None,
    offset: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    activation: str = "",
    gated: bool = False,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply vectors by a weight of the same format, scale each output, and undo the rounding of the vectors.

    Parameters
    ----------
    codes
        (..., n), int8 or float8_e4m3fn; they stand for ``step (codes - zero)``.
    weight
        (m, n), of the same dtype.
    scale
        (m,) float32.
    few
        The most vectors for which the kernel runs, -1 for any number; more go to the library's product of such numbers where it has
        one for the shape.
    step, zero
        A number for each vector or one for all, floating; None for 1 and 0.
    offset
        (m,) float32, sums of each row of the weight times its scale; needed with `zero`.
    dtype
        Of the result.
    bias
        (m,) or None.
    activation, gated, factor, residual
        What is done with sums before they are stored, as `recast.kernels.quantized_matmul.dequantizing_op` has it.

    Returns
    -------
    (..., m), or (..., m / 2) where rows are gated. Gradients reach step, zero, bias, factor and residual. Codes have none: what
    rounds them decides what stands for it.

    Raises
    ------
    ValueError
        There is no such activation.

    Examples
    --------
    >>> codes, weight = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, 1.5]])
    >>> eight = torch.float8_e4m3fn
    >>> eight_bit_matmul(codes.to(eight), weight.to(eight), torch.tensor([2.0])).tolist()
    [[11.0]]
    """
    flat, rows = codes.reshape(-1, codes.shape[-1]), weight.shape[0]
    epilogue = Epilogue.of(activation, gated, factor, residual)
    rounded = Rounded(_each(step, len(flat)), _each(zero, len(flat)), offset)
    kernel = codes.device.type == "cuda" or interpreting()
    by_library = 0 <= few < flat.shape[0] and library.serves(flat, weight)
    narrow = Rounded(*(None if t is None else t.float().contiguous() for t in rounded))
    if kernel and not by_library:
        y = launch(flat, weight, scale, rounded=narrow, bias=bias, epilogue=epilogue, dtype=dtype)
    else:
        y = (library if by_library else reference).eight_bit_matmul(flat, weight, scale)
        if kernel and (step is not None or bias is not None or not epilogue.empty):
            out = y.new_empty((len(y), epilogue.outputs(rows)), dtype=dtype)
            y = finish(y.contiguous(), out, epilogue, bias=bias, **narrow._asdict())
        else:
            y = unrounded(y, rounded)
            y = finished(y if bias is None else y + bias, epilogue).to(dtype)
    return y.reshape(*codes.shape[:-1], epilogue.outputs(rows))


def _each(number: Tensor | None, tokens: int) -> Tensor | None:
    """One number for each vector: (tokens,)."""
    return None if number is None else number.reshape(-1).expand(tokens)


@eight_bit_matmul.register_fake
def _(codes: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
    dtype = rest[5] if len(rest) > 5 else more.get("dtype", torch.float32)
    gated = rest[8] if len(rest) > 8 else more.get("gated", False)
    return codes.new_empty((*codes.shape[:-1], weight.shape[0] // (2 if gated else 1)), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, weight, scale, few, step, zero, offset, _, bias, activation, gated, factor, residual = inputs
    ctx.save_for_backward(codes, weight, scale, step, zero, offset, bias, factor, residual)
    ctx.settings = few, activation, gated


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, weight, scale, step, zero, offset, bias, factor, residual = ctx.saved_tensors
    few, activation, gated = ctx.settings
    epilogue = Epilogue.of(activation, gated, factor, residual)
    product = eight_bit_matmul(codes, weight, scale, few)
    sums = unrounded(product.reshape(-1, product.shape[-1]), Rounded(None, _each(zero, _count(codes)), offset))
    steps = 1 if step is None else step.reshape(-1, 1)
    z = sums * steps if bias is None else sums * steps + bias
    back, to_factor = backward(gradient.reshape(-1, gradient.shape[-1]).to(z.dtype), z, epilogue)
    to_step = to_zero = None
    if step is not None and ctx.needs_input_grad[4]:
        to_step = (back * sums).sum(1).reshape(-1, 1).sum_to_size(step.reshape(-1, 1).shape).reshape(step.shape)
    if zero is not None and ctx.needs_input_grad[5]:
        to_zero = (
            -(back * steps * offset).sum(1).reshape(-1, 1).sum_to_size(zero.reshape(-1, 1).shape).reshape(zero.shape)
        )
    to_bias = None if bias is None else back.sum(0).to(bias.dtype)
    to_factor = None if factor is None or to_factor is None else to_factor.to(factor.dtype).reshape(factor.shape)
    to_residual = None if residual is None else gradient.to(residual.dtype)
    to_step, to_zero = (None if g is None else g.to(t.dtype) for g, t in ((to_step, step), (to_zero, zero)))
    return None, None, None, None, to_step, to_zero, None, None, to_bias, None, None, to_factor, to_residual


def _count(codes: Tensor) -> int:
    return codes.numel() // codes.shape[-1] if codes.shape[-1] else 0


eight_bit_matmul.register_autograd(_gradients, setup_context=_keep)
