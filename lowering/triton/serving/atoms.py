"""Combinations of matrices that layers share: `recast::atoms_matmul` where these are codes of fewer bytes than the combination.

Matrices of 16 bits are more bytes than what they are added up to, as soon as there are two: no kernel could read less than the dense
matrix, and plain code writes the sum out at every call. ``keep_dense=True`` writes it out once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recast.kernels.atoms_matmul.atoms_op import atoms_matmul
from recast.kernels.atoms_matmul.stacked import stack, width_of
from recast.lowering.packed import Packed, plain
from recast.lowering.timing import most_tokens
from recast.lowering.triton.serving.dequantizing import codes_of, refused
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.shared_atoms import Atoms

__all__ = ["ATOMS", "serve", "serve_dense"]

ATOMS = "triton dequantizing matmul of shared atoms"
# Where nothing is measured: beyond, every matrix multiplied by all tokens takes longer than writing the combination out.
_FEW = 64


def serve_dense(operator: Operator) -> Packed | None:
    """Write the combination out, once; None for what is none. The kernel's name says what memory it takes."""
    if not isinstance(operator, Atoms):
        return None
    weight = operator.to_dense().contiguous()

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, tensors["weight"].to(x.dtype))

    return Packed(operator, f"aten (shared atoms, written out once: {_size(weight.nbytes)})", {"weight": weight}, run)


def serve(operator: Operator) -> Packed | None:
    """Lay the matrices out side by side, once for all operators that hold them; None for what is no combination."""
    if not isinstance(operator, Atoms):
        return None
    reason = _refused(operator)
    if reason is not None:
        return plain(operator, f"aten (shared atoms: {reason})")
    made = _stacked(operator)
    width, (bits, group, kind) = made.width, made.settings
    held = {**made.held, "coefficients": operator.coefficients}

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parts = (tensors.get(name) for name in ("high_values", "scale", "zero", "table", "pairs"))
        coefficients, values = tensors["coefficients"], tensors["values"]
        y: Tensor = atoms_matmul(x, coefficients, values, *parts, bits, group, kind, width, made.few)
        return y

    return Packed(operator, ATOMS, held, run)


def _refused(operator: Atoms) -> str | None:
    """Why nothing is gained by a kernel, or there is none; None where it serves."""
    m, n = operator.shape
    dense = m * n * operator.dtype.itemsize
    held = sum(atom.nbytes for atom in operator.atoms)
    if held >= dense:
        found = f"{len(operator.atoms)} of {_size(held)} in place of {_size(dense)}"
        return f"{found}; keep_dense=True writes the sum out once"
    if operator.dtype == torch.float64:
        return "float64, no kernel"
    first = operator.atoms[0]
    for atom in operator.atoms:
        if not isinstance(atom, Quantized | Codebook) or type(atom) is not type(first):
            return "no codes of one kind, no kernel"
        why = refused(atom)
        if why is not None:
            return why
        if (atom.bits, atom.group) != (first.bits, first.group):
            return "codes of several kinds, no kernel"
        if isinstance(atom, Codebook) and isinstance(first, Codebook) and not torch.equal(atom.table, first.table):
            return "tables of their own, no kernel"
    return None


class _Stacked:
    """Matrices side by side, and those they were made of: as long as these live, nothing else can be at their addresses."""

    def __init__(self, operator: Atoms) -> None:
        self.atoms = operator.atoms
        found = [codes_of(atom) for atom in operator.atoms if isinstance(atom, Quantized | Codebook)]
        first, atom = found[0], operator.atoms[0]
        assert isinstance(atom, Quantized | Codebook)
        self.width = width_of(operator.shape[1], atom.bits, first.group)
        scales, zeros = [f.scale for f in found], [f.zero for f in found]
        self.held, group = stack([f.codes for f in found], scales, zeros, atom.bits, first.group)
        self.settings = atom.bits, group, first.kind
        for name, tensor in (("table", first.table), ("pairs", first.pairs)):
            if tensor is not None:
                self.held[name] = tensor
        self.few = self._few(operator)

    def _few(self, operator: Atoms) -> int:
        """The most tokens for which all matrices multiplied are faster than the combination written out first."""
        device, n = self.held["values"].device, operator.shape[1]
        if device.type != "cuda":
            return _FEW
        parts = [self.held.get(name) for name in ("high_values", "scale", "zero", "table", "pairs")]
        (bits, group, kind), width = self.settings, self.width
        coefficients = torch.ones(len(self.atoms), device=device)

        def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
            x = torch.randn(tokens, n, dtype=operator.dtype, device=device)

            def multiply(few: int) -> Tensor:
                y: Tensor = atoms_matmul(x, coefficients, self.held["values"], *parts, bits, group, kind, width, few)
                return y

            return functools.partial(multiply, tokens), functools.partial(multiply, 0)

        about = "atoms", self.settings, len(self.atoms), operator.shape, str(operator.dtype), *sorted(self.held)
        return most_tokens(ways, device, *about, among=(16, 32, 64, 128, 256)) or 8


# Layers of a group hold the same matrices, and are to hold them once after they have been laid out.
_made: weakref.WeakValueDictionary[Any, _Stacked] = weakref.WeakValueDictionary()


def _stacked(operator: Atoms) -> _Stacked:
    key = tuple(
        (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype, str(t.device))
        for atom in operator.atoms
        for t in atom.tensors().values()
    )
    made = _made.get(key)
    if made is None:
        made = _made[key] = _Stacked(operator)
    return made


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
