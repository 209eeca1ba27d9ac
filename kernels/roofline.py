"""The least time that moving bytes and multiplying numbers takes on a device: what kernels are held to.

Figures are the makers' own for dense products: NVIDIA's data sheets of A100 (80 GB SXM), H100 SXM, H200 and B200, AMD's of MI300X.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DEVICES", "Device", "Work", "device_named"]


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes
    ----------
    bytes
        Read from and written to the device's memory, each once.
    flops
        A multiplication and an addition count two.
    rate
        The numbers that are multiplied: "bf16", "fp8", "int8", "sparse bf16", "sparse fp8".
    """

    bytes: int
    flops: int
    rate: str = "bf16"


@dataclass(frozen=True)
class Device:
    """A device's bandwidth and rates.

    Attributes
    ----------
    name
        As its maker writes it.
    bandwidth
        Bytes a second.
    rates
        Floating or integer operations a second, by the numbers multiplied.
    processors
        Units that run blocks of a kernel beside each other.
    cache
        Bytes of the cache that all of them share.
    """

    name: str
    bandwidth: float
    rates: Mapping[str, float] = field(hash=False)
    processors: int
    cache: int

    def floor(self, work: Work) -> float:
        """Return the seconds below which a call cannot be.

        Examples
        --------
        >>> h200 = device_named("NVIDIA H200")
        >>> decode = Work(bytes=2 * 8192 * 28672, flops=2 * 8192 * 28672)
        >>> round(h200.floor(decode) * 1e6, 1)  # microseconds: of memory
        97.9
        """
        return max(work.bytes / self.bandwidth, work.flops / self.rates[work.rate])


def _rates(bf16: float, eight: float | None, *, sparse: bool = True) -> dict[str, float]:
    found = {"bf16": bf16 * 1e12, "int8": 2e12 * bf16}
    if eight is not None:
        found["fp8"] = eight * 1e12
    if sparse:
        found["sparse bf16"] = 2 * found["bf16"]
        if eight is not None:
            found["sparse fp8"] = 2 * found["fp8"]
    return found


DEVICES = (
    Device("NVIDIA A100", 2.039e12, _rates(312, None), 108, 40 << 20),
    Device("NVIDIA H100", 3.35e12, _rates(989.4, 1978.9), 132, 50 << 20),
    Device("NVIDIA H200", 4.8e12, _rates(989.4, 1978.9), 132, 50 << 20),
    Device("NVIDIA B200", 8.0e12, _rates(2250, 4500), 148, 126 << 20),
    Device("AMD Instinct MI300X", 5.3e12, _rates(1307.4, 2614.9), 304, 256 << 20),
)


def device_named(name: str) -> Device | None:
    """Return the figures of a device by what its driver calls it, None for one that is not known.

    Examples
    --------
    >>> device_named("NVIDIA H200 NVL").name, device_named("another")
    ('NVIDIA H200', None)
    """
    return next((device for device in DEVICES if device.name in name), None)
