"""Inductor: the rewritten program compiled by `torch.compile`, with the fastest kernel known for each operator on this CPU."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from recast.lowering.base import Lowering, Runner
from recast.lowering.inductor.compile import compile_program, inlined
from recast.lowering.inductor.kernels import choice
from recast.lowering.inline import Choose
from recast.patterns.errors import TargetError
from recast.patterns.program import Program

__all__ = ["Inductor"]


class Inductor(Lowering):
    """Compiles a program with Inductor.

    Parameters
    ----------
    freezing
        Take weights as constants and lay them out for the machine's matrix library (default). The artifact owns its weights,
        so nothing else may change them.
    options
        Further Inductor options.
    keep_dense
        On a CPU: keep weights that are packed written out as well, for many tokens. Takes the memory of dense weights, and saves
        writing them out at each call.
    accuracy_level
        On a CPU: 4 rounds few tokens to int8 before they meet packed integer weights, in each group of a weight for itself, as the
        level of that number does in ONNX Runtime: faster, and off by about half a percent of the outputs' size. 0, the default,
        multiplies them as they are.

    Raises
    ------
    TargetError
        There is no such level.
    """

    name: ClassVar[str] = "inductor"
    summary: ClassVar[str] = "torch.compile with Inductor (CPU and CUDA)"
    compiles: ClassVar[bool] = True

    def __init__(
        self,
        freezing: bool = True,
        options: dict[str, Any] | None = None,
        *,
        keep_dense: bool = False,
        accuracy_level: int = 0,
    ) -> None:
        if accuracy_level not in (0, 4):
            raise TargetError(
                f"target '{self.name}': accuracy_level is {accuracy_level}; 0 (exact) or 4 (int8 activations) would work"
            )
        self.freezing, self.options, self.keep_dense = freezing, dict(options or {}), keep_dense
        self.accuracy_level = accuracy_level
        self._kernels: dict[str, str] = {}

    def prepare(self, program: Program) -> Runner:
        """Compile on first call for each set of shapes that needs its own code; sizes that were dynamic stay so."""
        inlined, self._kernels = self._inlined(program)
        compiled = compile_program(inlined, self._kernels, freezing=self.freezing, options=self.options)

        def run(leaves: list[Any]) -> list[Any]:
            with torch.no_grad():
                return list(compiled(*leaves))

        return run

    def kernels(self, program: Program) -> dict[str, str]:
        """What `prepare` chose for each site, or would choose."""
        return dict(self._kernels or self._inlined(program)[1])

    def _inlined(self, program: Program) -> tuple[Program, dict[str, str]]:
        """The program without operator nodes, and the kernel of each site."""
        return inlined(program, self._choice())

    def _choice(self) -> Choose:
        return choice(frozen=self.freezing, keep_dense=self.keep_dense, rounded=self.accuracy_level == 4)

    def extra(self) -> dict[str, Any]:
        """Options, as they were."""
        return {
            "freezing": self.freezing,
            "options": self.options,
            "keep_dense": self.keep_dense,
            "accuracy_level": self.accuracy_level,
        }
