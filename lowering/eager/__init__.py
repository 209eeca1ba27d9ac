"""Eager: the rewritten program as it stands, operation by operation; what every other target is checked against."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from recast.lowering.base import Lowering, Runner
from recast.passes.module import OperatorModule
from recast.patterns.program import Program

__all__ = ["Eager"]


class Eager(Lowering):
    """Runs a program with plain torch operations."""

    name: ClassVar[str] = "eager"
    summary: ClassVar[str] = "plain torch operations; the reference"

    def prepare(self, program: Program) -> Runner:
        """The program's own graph module."""

        def run(leaves: list[Any]) -> list[Any]:
            with torch.no_grad():
                return list(program.module(*leaves))

        return run

    def kernels(self, program: Program) -> dict[str, str]:
        """Plain torch everywhere."""
        modules = (program.module.get_submodule(str(n.target)) for n in program.graph.nodes if n.op == "call_module")
        return {m.site: "torch" for m in modules if isinstance(m, OperatorModule)}
