"""Blocks on a diagonal, alone and in Monarch and BlockDense weights; beside them batched products of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul import reference
from recast.kernels.block_diagonal_matmul.block_op import block_matmul
from recast.kernels.timed import BenchCase, Prepared, moved, rank_for

__all__ = ["cases"]

_BLOCKS = 4
_MONARCH, _DENSE = "torch, two bmm with transpositions", "torch, bmm and F.linear"
Product = Callable[..., Tensor]


@dataclass(frozen=True)
class _Factors:
    """Blocks (inputs first), how features are moved after each, and a dense factor after them, if there is one."""

    held: dict[str, Tensor]
    grids: Sequence[Sequence[int]]

    def times(self, given: Mapping[str, Tensor], x: Tensor, product: Product) -> Tensor:
        for i, grid in enumerate(self.grids):
            x = product(x, given[f"blocks{i}"], None, None, given.get(f"scatter{i}"), [], grid)
        return torch.nn.functional.linear(x, given["dense"]) if "dense" in given else x


def cases() -> Iterator[BenchCase]:
    """Four blocks in every form; a permutation that was found by a fit, which writes by an index, is only checked."""
    monarch, dense = (_BLOCKS, _BLOCKS), (1, _BLOCKS)
    yield _case("block diagonal, 4", _diagonal, monarch, roundings=0)
    yield _case("block diagonal, 4, permuted", _permuted, monarch, roundings=0, timed=False)
    yield _case("Monarch, 4 blocks, 32 %", _monarch, monarch, against=(_MONARCH,))
    yield _case("BlockDense, 4 blocks, 33 %", _block_dense, dense, against=(_DENSE,))
    yield _case(_MONARCH, _monarch, monarch, peer=True)
    yield _case(_DENSE, _block_dense, dense, peer=True)


def _case(
    name: str,
    draw: Callable[[int, int, torch.dtype, torch.device], _Factors],
    multiples: tuple[int, int],
    *,
    roundings: int = 1,
    timed: bool = True,
    peer: bool = False,
    against: tuple[str, ...] = (),
) -> BenchCase:
    # In plain torch the reference is the batched product that users write.
    product: Product = reference.block_matmul if peer else block_matmul

    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        factors = draw(rows, inputs, dtype, device)
        held = factors.held
        learned = tuple(name for name in held if not name.startswith("scatter"))
        count = sum(held[name].numel() for name in learned)

        def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return factors.times(given, x, product)

        def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return factors.times(given, x, reference.block_matmul)

        return Prepared(held, run, meant, moved(held, rows, inputs, weights=count), learned=learned)

    dtypes = (torch.bfloat16,) if peer else (torch.bfloat16, torch.float16, torch.float32)
    return BenchCase(
        name, "block diagonal", prepare, multiples=multiples, roundings=roundings, timed=timed, peer=peer, against=against,
        dtypes=dtypes,
    )  # fmt: skip


def _blocks(count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Blocks whose rows begin at multiples of 16 bytes, as they are laid out for the kernel."""
    blocks = (torch.randn(count, rows, columns, device=device) / columns**0.5).to(dtype)
    return torch.nn.functional.pad(blocks, (0, -columns % reference.PADDING))


def _diagonal(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> _Factors:
    return _Factors({"blocks0": _blocks(_BLOCKS, rows // _BLOCKS, inputs // _BLOCKS, dtype, device)}, [[]])


def _permuted(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> _Factors:
    found = _diagonal(rows, inputs, dtype, device)
    return _Factors({**found.held, "scatter0": torch.randperm(rows, device=device).to(torch.int32)}, [[]])


def _monarch(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> _Factors:
    """Four blocks into a narrow space, a transposition of it, four blocks out of it, a transposition of the outputs."""
    inner = rank_for(0.33, rows, inputs, blocks=(_BLOCKS, _BLOCKS), of=32 * _BLOCKS if min(rows, inputs) > 1024 else 16)
    each = inner // _BLOCKS
    held = {
        "blocks0": _blocks(_BLOCKS, each, inputs // _BLOCKS, dtype, device),
        "blocks1": _blocks(_BLOCKS, rows // _BLOCKS, each, dtype, device),
    }
    return _Factors(held, [[_BLOCKS, _BLOCKS, each // _BLOCKS], [_BLOCKS, rows // _BLOCKS, 1]])


def _block_dense(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> _Factors:
    inner = rank_for(0.33, rows, inputs, blocks=(1, _BLOCKS), of=64 if min(rows, inputs) > 1024 else 16)
    held = {
        "blocks0": _blocks(_BLOCKS, inner // _BLOCKS, inputs // _BLOCKS, dtype, device),
        "dense": (torch.randn(rows, inner, device=device) / inner**0.5).to(dtype),
    }
    return _Factors(held, [[]])
