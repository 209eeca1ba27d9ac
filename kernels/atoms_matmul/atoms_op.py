"""`recast::atoms_matmul`: a combination of matrices of codes times floating activations, as one operation of a graph.

Few tokens meet the matrices side by side in the kernel of packed codes (`stacked` says how), which reads each of them once and writes
none out. For many the combination is written out, since each matrix would be multiplied by all of them, and goes to the library.
S matrices of w bits are ``S w / 8`` bytes a place, for the 2 of a dense matrix in 16 bits: two or three in four bits take fewer, of
16 bits each more, whatever their number. The number of tokens decides when it runs, so no graph is compiled again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.atoms_matmul.stacked import combined, repeated
from recast.kernels.quantized_matmul.dequantizing_op import written_out
from recast.kernels.quantized_matmul.launch import launch, write_out
from recast.kernels.tiles import interpreting

__all__ = ["atoms_matmul"]


@torch.library.custom_op("recast::atoms_matmul", mutates_args=())
def atoms_matmul(
    x: Tensor,
    coefficients: Tensor,
    values: Tensor,
    high_values: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    pairs: Tensor | None,
    bits: int,
    group: int,
    kind: str,
    width: int,
    few: int,
) -> Tensor:
    """Multiply vectors by ``sum_s c_s D_s``.

    Parameters
    ----------
    x
        (..., n), floating.
    coefficients
        (s,) floating.
    values, high_values, scale, zero
        The matrices side by side, each `width` inputs wide, as `stacked.stack` gives them.
    table, pairs, bits, group, kind
        As `recast::dequantizing_matmul` takes them.
    width
        Inputs that each matrix is filled up to.
    few
        The most vectors for which no matrix is written out.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x and the coefficients; codes and scales are constants.

    Examples
    --------
    >>> from recast.kernels.atoms_matmul.stacked import stack
    >>> codes = [torch.tensor([[9, 7]]), torch.tensor([[8, 15]])]  # 1, -1 and 0, 7
    >>> held, group = stack(codes, [torch.ones(1, 1)] * 2, [None] * 2, 4, 0)
    >>> x, c = torch.tensor([[3.0, 1.0]]), torch.tensor([10.0, 1.0])
    >>> atoms_matmul(x, c, held["values"], None, held["scale"], None, None, None, 4, group, "integer", 128, 8).tolist()
    [[27.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.device.type == "cuda" or (interpreting() and x.dtype != torch.float64):
        paired = pairs is not None and table is not None and table.dtype == x.dtype
        operands = values, high_values, scale, zero, pairs if paired else table
        coded: dict[str, Any] = {"bits": bits, "group": group, "kind": "pairs" if paired else kind}
        if flat.shape[0] <= few:
            y = launch(repeated(flat, coefficients, width), *operands, None, None, None, **coded)
            return y.reshape(*x.shape[:-1], values.shape[0])
        whole = write_out(*operands, **coded, features=len(coefficients) * width, dtype=x.dtype)
    else:
        whole = _whole(x, coefficients, values, high_values, scale, zero, table, bits, group, kind, width)
    y = torch.nn.functional.linear(flat, combined(whole, coefficients, x.shape[-1]))
    return y.reshape(*x.shape[:-1], values.shape[0])


def _whole(
    x: Tensor,
    coefficients: Tensor,
    values: Tensor,
    high_values: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    kind: str,
    width: int,
) -> Tensor:
    """Matrices side by side (m, s width) in x's dtype, by plain torch."""
    return written_out(
        values, high_values, scale, zero, table,
        bits=bits, group=group, kind=kind, features=coefficients.shape[0] * width, dtype=x.dtype,
    )  # fmt: skip


@atoms_matmul.register_fake
def _(x: Tensor, coefficients: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[8:12]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, coefficients, *held = ctx.saved_tensors
    whole, n = _whole(x, coefficients, *held, *ctx.settings), x.shape[-1]
    back = gradient.reshape(-1, gradient.shape[-1])
    to_x = to_coefficients = None
    if ctx.needs_input_grad[0]:
        to_x = (back @ combined(whole, coefficients, n)).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        wide = torch.promote_types(x.dtype, torch.float32)
        to_weight = back.T.to(wide) @ x.reshape(-1, n).to(wide)
        matrices = whole.reshape(whole.shape[0], coefficients.shape[0], -1)[..., :n].to(wide)
        to_coefficients = torch.einsum("mn,msn->s", to_weight, matrices).to(coefficients.dtype)
    return (to_x, to_coefficients, *[None] * 11)


atoms_matmul.register_autograd(_gradients, setup_context=_keep)
