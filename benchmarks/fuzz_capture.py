"""Capture of the pieces that random programs are put together from: many modules in one export, kept in files."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fuzz_programs import Linear
from recast.passes.serialize import program_from, program_to
from recast.patterns.capture.export import capture
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import Program

__all__ = ["ACROSS", "STRAIGHT", "Key", "Wanted", "captured", "keep", "kept", "key_of", "layout_of", "read", "slots_of"]

Key = tuple[Any, ...]
STRAIGHT, ACROSS = (0, 1, 2), (0, 2, 1)  # dimensions from the outermost in memory to the innermost


class _Several(nn.Module):
    """Modules side by side; those that take the same kind of input share it: sizes of many inputs take long to tell apart."""

    def __init__(self, modules: Iterable[nn.Module], takes: Iterable[int]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(modules)
        self.takes = tuple(takes)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [piece(xs[i]) for piece, i in zip(self.pieces, self.takes, strict=True)]


@dataclasses.dataclass
class Wanted:
    """A module to be captured with an input of some features, in some layout."""

    module: nn.Module
    features: int
    layout: tuple[int, ...]


def captured(wanted: dict[Key, Wanted]) -> Program:
    """The program of several modules side by side, of linears plain ones in their place."""
    skeletons, takes = [], []
    kinds: dict[tuple[int, tuple[int, ...]], int] = {}
    for one in wanted.values():
        skeleton = copy.deepcopy(one.module)
        for slot in slots_of(one.module):
            whole = getattr(one.module, slot)
            setattr(skeleton, slot, nn.Linear(whole.n, whole.m, bias=False))
        skeletons.append(skeleton)
        takes.append(kinds.setdefault((one.features, one.layout), len(kinds)))
    examples = []
    for features, layout in kinds:
        sizes = [(2, 5, features)[d] for d in layout]
        examples.append(torch.randn(sizes).permute([layout.index(d) for d in range(3)]))
    return capture(_Several(skeletons, takes).eval(), (examples,))


def keep(wanted: dict[Key, Wanted], folder: Path) -> None:
    """Capture modules into a file of a folder."""
    torch.set_num_threads(1)
    names = [repr(key) for key in wanted]
    file = folder / f"{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}.pt"
    partial = file.with_suffix(".partial")
    torch.save((names, *program_to(captured(wanted))), partial)
    partial.replace(file)


def kept(folder: Path) -> dict[Path, list[str]]:
    """Files of captured programs, and the keys of the pieces side by side in each, as text."""
    return {file: torch.load(file)[0] for file in sorted(folder.glob("*.pt"))}


def read(file: Path) -> Program:
    """The program of such a file."""
    return program_from(*torch.load(file)[1:])


def slots_of(module: nn.Module) -> list[str]:
    """Linears of a module, which are captured apart from it."""
    return [name for name, child in module.named_children() if isinstance(child, Linear)]


def key_of(module: nn.Module, layout: tuple[int, ...]) -> Key:
    """What tells one piece from another: the spelling, and how x lies in memory unless it enters linears alone."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str) and not k.startswith("_")}
    named = {k: v.__name__ for k, v in vars(module).items() if callable(v) and hasattr(v, "__name__")}
    slots = slots_of(module)
    held = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=not slots)}
    sizes = [(slot, getattr(module, slot).n, getattr(module, slot).m) for slot in slots]
    return (type(module).__name__, *sorted((plain | named | held).items()), *sizes, *(() if slots else (layout,)))


def layout_of(value: Any) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost."""
    strides = [size_hint(stride) for stride in value.stride()]
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
