"""Calls `short_keys.c`: attention on a CPU whose keys and values of a head fit into a core's second cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recast.kernels.native import Source

__all__ = ["fits", "short_keys", "unavailable"]

# Numbers of keys and values of one head that a second cache of half a megabyte holds beside the rest.
_HELD = 1 << 16
_KINDS = {torch.float32: 1, torch.bool: 2}


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "depth", "width")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        ("mask_strides", ctypes.c_int64 * 4),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("mask_kind", "causal", "half", "threads")),
    ]


_SOURCE = Source(__file__, {"attention": ([ctypes.POINTER(_Attention)], ctypes.c_int)})
unavailable = _SOURCE.unavailable  # why it does not run here, or None


def fits(keys: int, depth: int, width: int) -> bool:
    """Whether the keys (keys, depth) and values (keys, width) of a head are few enough.

    Examples
    --------
    >>> fits(512, 64, 64), fits(4096, 128, 128)
    (True, False)
    """
    return keys * (depth + width) <= _HELD


def short_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Compute ``softmax(scale q kᵀ + mask) v``, adding up in float32, a head of a sequence at a time.

    With AVX512-BF16 the weights of bfloat16 operands are rounded to bfloat16 before they meet the values, as torch's are.

    Parameters
    ----------
    q, k, v
        (b, h, l, d), (b, g, s, d), (b, g, s, e), g dividing h; all float32 or all bfloat16, with any strides.
    mask
        Added, or bool: True is seen; broadcasts to (b, h, l, s). Queries that see no key get zeros.
    causal
        Query i sees keys 0 to i.
    scale
        Of the products.

    Returns
    -------
    (b, h, l, e) in q's dtype, laid out as (b, l, h, e).

    Raises
    ------
    RuntimeError
        The kernel does not run here.
    MemoryError
        There was none for a thread's keys.
    """
    (batch, heads, queries, depth), (groups, keys) = q.shape, k.shape[1:3]
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    if not out.numel():
        return out
    if not keys:
        return out.zero_()
    q, k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        if mask.dtype != torch.bool:
            mask = mask.to(torch.float32)  # before it is spread over heads, of which all may share it
        mask = mask.expand(batch, heads, queries, keys)
    three = ctypes.c_int64 * 3
    given = _Attention(
        *(0 if t is None else t.data_ptr() for t in (q, k, v, mask, out)),
        *(batch, heads, heads // groups, queries, keys, depth, v.shape[3]),
        *(three(*t.stride()[:3]) for t in (q, k, v, out)),
        (ctypes.c_int64 * 4)(*(mask.stride() if mask is not None else (0, 0, 0, 0))),
        scale,
        *(0 if mask is None else _KINDS[mask.dtype], causal, q.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    if _SOURCE.attention(given):
        raise MemoryError(
            f"attention: no memory for the keys and values of a head, {keys} x {depth + v.shape[3]} numbers"
        )
    return out
