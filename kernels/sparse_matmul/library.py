"""2:4 products of the hardware's own sparse matrix units, by the libraries that PyTorch brings: for many vectors.

Matrix units from NVIDIA's sm_80 on multiply a 2:4 operand at twice the rate of a dense one, if it comes in their own layout. Two
libraries do so, each from a copy of the weight in a layout of its own, nine sixteenths of the dense bytes:

- *cuSPARSELt* (``torch._cslt_compress``, ``torch._cslt_sparse_mm``), if torch was built with it; rows and inputs in multiples of 16.
- *CUTLASS* (``torch._sparse_semi_structured_mm`` and ``_addmm``), which torch takes on compute capability 8.x only; rows in multiples
  of 32, inputs of 64.

Vectors are filled up to a multiple of eight. All of this is what `torch.sparse.semi_structured` calls, whose tensor subclass, a
prototype that warns, is of no use inside a custom operation. Not run on a GPU yet: what torch refuses there in spite of these rules
is found out before a weight is handed over (`packed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["multiply", "packed", "refused", "way_for"]

_MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
_VECTORS = 8


def way_for(capability: tuple[int, int], cusparselt: bool) -> str | None:
    """Return the library for a compute capability, given whether torch has cuSPARSELt; None if there is none.

    Examples
    --------
    >>> way_for((9, 0), True), way_for((8, 6), False), way_for((9, 0), False), way_for((7, 5), True)
    ('cusparselt', 'cutlass', None, None)
    """
    if capability < (8, 0):
        return None
    return "cusparselt" if cusparselt else "cutlass" if capability[0] == 8 else None


def refused(rows: int, features: int, dtype: torch.dtype, way: str | None) -> str | None:
    """Return why a library does not take a weight (rows, features), None where it does.

    Examples
    --------
    >>> refused(4096, 4096, torch.bfloat16, "cutlass")
    >>> refused(4096, 4000, torch.bfloat16, "cutlass")
    '4096 x 4000: multiples of 32 x 64 are needed'
    """
    if way is None:
        return "no library here multiplies 2:4 weights"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"values in {str(dtype).removeprefix('torch.')}: 16-bit floats are needed"
    by_rows, by_features = _MULTIPLES[way]
    if not rows or not features or rows % by_rows or features % by_features:
        return f"{rows} x {features}: multiples of {by_rows} x {by_features} are needed"
    return None


def packed(weight: Tensor) -> tuple[Tensor, Tensor | None] | str:
    """Lay a 2:4 weight out for the library of its device, and multiply with it once.

    Parameters
    ----------
    weight
        (m, n), float16 or bfloat16, at most two of every four inputs not zero.

    Returns
    -------
    (packed, meta), nine sixteenths of the weight's bytes, `meta` None if it is in `packed`; or the reason why there is none.

    Examples
    --------
    >>> packed(torch.zeros(32, 64, dtype=torch.float16))
    'no library here multiplies 2:4 weights'
    """
    way = None
    if weight.device.type == "cuda" and torch.version.hip is None:
        way = way_for(torch.cuda.get_device_capability(weight.device), torch.backends.cusparselt.is_available())
    reason = refused(weight.shape[0], weight.shape[1], weight.dtype, way)
    if way is None or reason is not None:
        return reason or "no library here multiplies 2:4 weights"
    try:
        with torch.cuda.device(weight.device):
            found = _laid_out(weight.contiguous(), way)
            multiply(weight.new_zeros(1, weight.shape[1]), *found, None)
    except RuntimeError as error:  # of another generation of GPUs than the library knows, say
        return f"{way}: {str(error).splitlines()[0]}"
    return found


def _laid_out(weight: Tensor, way: str) -> tuple[Tensor, Tensor | None]:
    if way == "cusparselt":
        return torch._cslt_compress(weight), None
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, meta = sparse_semi_structured_from_dense_cutlass(weight)  # type: ignore[no-untyped-call]
    return values, meta


def multiply(x: Tensor, values: Tensor, meta: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply vectors by a weight in a library's layout, ``x Wᵀ + bias``.

    Parameters
    ----------
    x
        (tokens, n), in the weight's dtype.
    values, meta
        As `packed` gives them.
    bias
        (m,) or None.

    Returns
    -------
    (tokens, m), contiguous, in x's dtype.

    Raises
    ------
    RuntimeError
        The library refuses.
    """
    tokens = x.shape[0]
    # Of a view torch would take the strides to be those of whole rows.
    columns = torch.nn.functional.pad(x, (0, 0, 0, -tokens % _VECTORS)).contiguous().T
    bias = None if bias is None else bias.to(x.dtype)
    if meta is None:
        y = torch._cslt_sparse_mm(values, columns, bias=bias, transpose_result=True)
    elif bias is None:
        y = torch._sparse_semi_structured_mm(values, meta, columns).T
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, meta, columns).T
    return y[:tokens].contiguous()
