"""What is checked and timed on a device: each kernel's folder lists it in a file `bench.py` with a function ``cases()``.

A case lays random numbers out as its kernel takes them, for a weight of any shape, and says what they mean in plain torch. What a user
would run instead, operations of PyTorch for the same weight, are cases too. `benchmarks.kernels_gpu` runs them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from recast.kernels.roofline import Work

__all__ = ["BenchCase", "Prepared", "Run", "cases", "moved", "rank_for", "two_of_four"]

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A weight (m, n), laid out, and the product with it.

    Attributes
    ----------
    held
        Tensors of the weight by name. Copies of them take turns where times are taken.
    run
        The product: from tensors as in `held` and x (tokens, n) to (tokens, m).
    meant
        The same in plain torch, given x in float64 and `held` with what is in `learned` in float64.
    work
        Bytes and operations by the number of tokens.
    ways
        Other ways of the same operation, by name, among which a program takes the fastest; for many tokens only.
    learned
        Names of tensors that have gradients.
    again
        Lays out another copy; None: tensors are cloned.
    """

    held: dict[str, Tensor]
    run: Run
    meant: Run
    work: Callable[[int], Work]
    ways: Mapping[str, Run] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    again: Callable[[], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class BenchCase:
    """Something that multiplies by a weight in some form.

    Attributes
    ----------
    name
        As tables show it.
    family
        Cases of a family stand in one picture.
    prepare
        From rows m, inputs n, dtype of x and a device.
    peer
        Whether it is PyTorch's own and not of recast.
    against
        Names of the peers that do the same.
    multiples
        What m and n must be multiples of.
    dtypes
        Of x.
    roundings
        How often numbers are rounded to x's dtype on the way from x to the result, beside the result itself.
    gradients
        Whether x has a gradient.
    compiled
        A mode of `torch.compile`, where `run` is tensor code around an operation that a program would have compiled; or nothing.
    tokens
        The least and the most that it is for.
    timed
        Whether it is timed, or only checked.
    kernel
        The folder that lists it; `cases` sets it.
    """

    name: str
    family: str
    prepare: Callable[[int, int, torch.dtype, torch.device], Prepared]
    peer: bool = False
    against: tuple[str, ...] = ()
    multiples: tuple[int, int] = (1, 1)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    roundings: int = 0
    gradients: bool = True
    compiled: str = ""
    tokens: tuple[int, int] = (1, 1 << 30)
    timed: bool = True
    kernel: str = ""


def cases() -> Iterator[BenchCase]:
    """List the cases of every folder of `recast.kernels` that has a file `bench.py`.

    Examples
    --------
    >>> found = {case.name: case for case in cases()}
    >>> found["int4 g128"].kernel, found["int4 g128"].peer
    ('quantized_matmul', False)
    """
    package = importlib.import_module("recast.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        name = f"recast.kernels.{found.name}.bench"
        if found.ispkg and importlib.util.find_spec(name) is not None:
            for case in importlib.import_module(name).cases():
                yield replace(case, kernel=found.name)


def moved(
    held: Mapping[str, Tensor] | int, rows: int, inputs: int, *, weights: int | None = None, rate: str = "bf16"
) -> Callable[[int], Work]:
    """Return the work of a product that reads what is held and x once and writes its result in 16 bits.

    Parameters
    ----------
    held
        The tensors, or their bytes.
    rows, inputs
        Of the weight.
    weights
        Numbers that are multiplied by each vector, ``rows * inputs`` if not given.
    rate
        As `roofline.Work` has it.

    Examples
    --------
    >>> moved(100, 4, 8)(2)
    Work(bytes=148, flops=128, rate='bf16')
    """
    nbytes = held if isinstance(held, int) else sum(tensor.nbytes for tensor in held.values())
    count = rows * inputs if weights is None else weights
    return lambda tokens: Work(nbytes + 2 * tokens * (rows + inputs), 2 * tokens * count, rate)


def rank_for(share: float, rows: int, inputs: int, *, blocks: tuple[int, int] = (1, 1), of: int = 64) -> int:
    """Return the inner size at which two factors of a weight keep a share of its parameters, a multiple of `of`.

    Parameters
    ----------
    share
        Of the parameters, at most.
    rows, inputs
        Of the weight.
    blocks
        Into how many blocks on a diagonal the left and the right factor are cut.
    of
        The result is a multiple of it, at least once.

    Examples
    --------
    >>> rank_for(0.33, 14336, 4096), rank_for(0.33, 14336, 4096, blocks=(1, 4))
    (1024, 1216)
    """
    rank = share * rows * inputs / (rows / blocks[0] + inputs / blocks[1])
    return max(of, int(rank) // of * of)


def two_of_four(rows: int, inputs: int, device: torch.device) -> Tensor:
    """Draw the places (rows, inputs / 2) of two of every four inputs, rising within each group.

    Examples
    --------
    >>> places = two_of_four(3, 8, torch.device("cpu"))
    >>> places.shape, bool((places[:, ::2] < places[:, 1::2]).all())
    (torch.Size([3, 4]), True)
    """
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], dtype=torch.uint8, device=device)
    drawn = torch.randint(6, (rows, inputs // 4), device=device, dtype=torch.int32)
    return pairs[drawn].reshape(rows, inputs // 2)
