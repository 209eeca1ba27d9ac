"""`recast::int8_matmul`: the integer product behind W8A8, as one operation that compilers leave whole.

Only the product is inside; rounding the activations before it and scaling after it are plain tensor code, which Inductor fuses
with its neighbours.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from recast.kernels.quantized_matmul.reference import integer_matmul

__all__ = ["has_vnni", "int8_matmul", "largest_exact_code", "onednn_available"]

# Weights laid out for oneDNN, by the storage they came from. Entries of freed weights are dropped when others are added.
_PACKED: dict[tuple[Any, ...], tuple[StorageWeakRef, int, Tensor, Tensor]] = {}


@torch.library.custom_op("recast::int8_matmul", mutates_args=())
def int8_matmul(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply int8 vectors by an int8 weight and scale each output feature.

    Parameters
    ----------
    codes
        (tokens, n) int8, of the activations.
    weight
        (m, n) int8.
    scale
        (m,) float32.

    Returns
    -------
    Tensor
        (tokens, m) float32, ``scale * sum(codes * weight)``; sums are exact where every ``abs(weight)`` is at most
        `largest_exact_code`.

    Examples
    --------
    >>> import torch
    >>> a, w = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4]], dtype=torch.int8)
    >>> int8_matmul(a, w, torch.ones(1)).tolist()
    [[11.0]]
    """
    if codes.shape[0] == 0:
        return codes.new_empty((0, weight.shape[0]), dtype=torch.float32)
    if codes.device.type == "cpu" and onednn_available():
        packed, zeros = _packed(weight)
        codes, middle = codes.contiguous(), 0
        if _takes_unsigned():
            codes, middle = codes.view(torch.uint8) ^ 128, 128  # 128 more
        return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
            codes, 1.0, middle, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return integer_matmul(codes, weight).to(torch.float32) * scale


@int8_matmul.register_fake
def _(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.float32)


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    storage = weight.untyped_storage()
    place = (storage._cdata, weight.storage_offset(), tuple(weight.shape), weight.stride())
    if place in _PACKED:
        reference, version, packed, zeros = _PACKED[place]
        if not reference.expired() and version == weight._version:  # type: ignore[no-untyped-call]
            return packed, zeros
    for old in [key for key, entry in _PACKED.items() if entry[0].expired()]:  # type: ignore[no-untyped-call]
        del _PACKED[old]
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    _PACKED[place] = (StorageWeakRef(storage), weight._version, packed, zeros)  # type: ignore[no-untyped-call]
    return packed, zeros


@functools.cache
def onednn_available() -> bool:
    """Whether torch was built with oneDNN's int8 products."""
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.onednn, "qlinear_prepack")


@functools.cache
def _takes_unsigned() -> bool:
    """Whether this CPU multiplies unsigned by signed bytes: of two signed ones oneDNN would then add up one by one.

    With VNNI and without AMX that takes five hundred times as long (torch 2.13).
    """
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def largest_exact_code() -> int:
    """Largest ``abs`` of a weight's code for which this CPU's int8 product is exact.

    Without VNNI (or AMX), x86 adds pairs of products of an unsigned and a signed byte in 16 bits and saturates:
    ``2 * 255 * 64 = 32640`` still fits, ``2 * 255 * 65`` does not.
    """
    capability = str(torch.backends.cpu.get_cpu_capability())
    if "AMX" in capability or has_vnni():
        return 128
    return 128 if not capability.startswith(("AVX", "DEFAULT")) else 64


def has_vnni() -> bool:
    """Whether this x86 CPU adds four products of bytes to 32 bits at once."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
