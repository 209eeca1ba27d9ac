"""Tables that hold the numbers of e4m3: their codes can be those numbers' bits, which a GPU converts instead of looking them up."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.tiles import interpreting
from recast.passes.forms.codebook import Codebook

__all__ = ["converts", "e4m3_of"]

_LARGEST = 448.0


def e4m3_of(weight: Codebook) -> tuple[Tensor, float] | None:
    """Return a table's entries in e4m3 and what they are multiplied with; None where it holds other numbers, or there are several.

    Examples
    --------
    >>> import recast
    >>> operator = recast.Form.parse("fp8").fit(torch.eye(32), None)
    >>> entries, unit = e4m3_of(operator)
    >>> entries.shape, round(1 / unit)
    (torch.Size([256]), 448)
    """
    if tuple(weight.table.shape[:2]) != (1, 1) or weight.table.shape[3] != 1:
        return None
    table = weight.table.reshape(-1).float()
    unit = float(table.abs().max()) / _LARGEST or 1.0  # tables are scaled to a largest entry of one
    entries = (table / unit).to(torch.float8_e4m3fn)
    exact = bool(((entries.float() * unit - table).abs() <= 1e-6 * table.abs()).all())
    return (entries, unit) if exact else None


def converts(device: torch.device) -> bool:
    """Whether kernels on a device convert e4m3: from compute capability 8.9 on, and AMD's in a few operations.

    Examples
    --------
    >>> converts(torch.device("meta"))
    False
    """
    if device.type != "cuda":
        return interpreting() and device.type == "cpu"
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 9)
