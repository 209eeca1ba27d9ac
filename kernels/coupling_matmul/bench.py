"""Groups of features coupled feature by feature, as between BLAST's block-diagonal factors; beside it PyTorch's batched product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.coupling_matmul import reference
from recast.kernels.coupling_matmul.coupling_op import coupling_matmul
from recast.kernels.timed import BenchCase, Prepared, Run, moved

__all__ = ["cases"]

_PEER = "torch, coupling by einsum"
_FEATURES = 64


def cases() -> Iterator[BenchCase]:
    """The operation and its peer, of groups of 64 features."""
    yield BenchCase("coupling", "coupling", _prepare_kernel, against=(_PEER,), multiples=(_FEATURES, _FEATURES))
    yield BenchCase(
        _PEER, "coupling", _prepare_peer, peer=True, multiples=(_FEATURES, _FEATURES), dtypes=(torch.bfloat16,)
    )


def _kernel(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    y: Tensor = coupling_matmul(x, given["weights"])
    return y


def _einsum(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weights = given["weights"]
    return torch.einsum("tjf,ijf->tif", x.reshape(len(x), *weights.shape[1:]), weights).flatten(1)


def _meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return reference.coupling_matmul(x, given["weights"].to(x.dtype))


def _prepare(run: Run, rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    groups = rows // _FEATURES, inputs // _FEATURES
    held = {"weights": (torch.randn(*groups, _FEATURES, device=device) / groups[1] ** 0.5).to(dtype)}
    work = moved(held, rows, inputs, weights=held["weights"].numel())
    return Prepared(held, run, _meant, work, learned=("weights",))


def _prepare_kernel(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    return _prepare(_kernel, rows, inputs, dtype, device)


def _prepare_peer(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    return _prepare(_einsum, rows, inputs, dtype, device)
