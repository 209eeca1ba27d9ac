"""Triton: the rewritten program compiled by `torch.compile`, with kernels of recast's own where weights are packed."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch

from recast.kernels.tiles import interpreting
from recast.lowering.base import Runner
from recast.lowering.inductor import Inductor
from recast.lowering.inductor.compile import inlined
from recast.lowering.inline import Choose
from recast.lowering.triton.kernels import choice, paired
from recast.patterns.errors import TargetError
from recast.patterns.program import Program

__all__ = ["Triton"]


class Triton(Inductor):
    """Compiles a program with Inductor; packed weights stay packed and are decoded in registers.

    Weights are never folded into constants: they would be written out.

    Parameters
    ----------
    freezing, options, accuracy_level
        As for `Inductor`; those for a CPU do nothing here.
    keep_dense
        Matrices that are put together from shared atoms of 16 bits are so once, instead of at every call: it takes the memory of a
        dense weight for each, which the report names beside the kernel.
    keep_copies
        Hold a weight in a second packed layout too where that is measured to be faster for many tokens. 2:4 weights in 16 bits have
        one, that of a library which uses the GPU's sparse matrix units, and then take 9/8 of the dense bytes instead of 9/16.
    """

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "Inductor with recast's Triton kernels (CUDA; ROCm compiles, untried)"

    def __init__(
        self,
        freezing: bool = True,
        options: dict[str, Any] | None = None,
        *,
        keep_dense: bool = False,
        accuracy_level: int = 0,
        keep_copies: bool = True,
    ) -> None:
        super().__init__(freezing, options, keep_dense=keep_dense, accuracy_level=accuracy_level)
        self.keep_copies = keep_copies

    def prepare(self, program: Program) -> Runner:
        """As `Inductor.prepare`; raises TargetError where nothing could run the kernels."""
        self.installed()
        return super().prepare(program)

    def _inlined(self, program: Program) -> tuple[Program, dict[str, str]]:
        """As `Inductor`'s, where two products of one vector can be one."""
        return inlined(program, self._choice(), paired())

    def _choice(self) -> Choose:
        return choice(keep_dense=self.keep_dense, copies=self.keep_copies)

    def extra(self) -> dict[str, Any]:
        """Options, as they were."""
        return {**super().extra(), "keep_copies": self.keep_copies}

    @classmethod
    def installed(cls) -> None:
        """Raise TargetError where nothing could run the kernels."""
        if importlib.util.find_spec("triton") is None:
            raise TargetError("target 'triton': Triton is not installed; `pip install 'recast[triton]'` would do")
        if not torch.cuda.is_available() and not interpreting():
            raise TargetError(
                "target 'triton': torch finds no GPU here; target 'inductor' runs on the CPU, and TRITON_INTERPRET=1 runs the "
                "kernels in Triton's interpreter, for tests"
            )
