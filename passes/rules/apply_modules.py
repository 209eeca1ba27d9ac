"""Apply: make the blocks smaller that the plan gives a form of their own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from recast.passes.base import Context, Pass, Soundness
from recast.passes.modules.apply import is_module, make_smaller
from recast.passes.report import SiteRow
from recast.patterns.program import Program

__all__ = ["ApplyModules"]


@dataclasses.dataclass(frozen=True)
class ApplyModules(Pass):
    """Linears of a block become smaller ones that share a smaller inner width; what follows sees a smaller model.

    Statistics in the context are then those of the smaller model.
    """

    name: ClassVar[str] = "apply_modules"
    soundness: ClassVar[Soundness] = Soundness.LOSSY

    def run(self, program: Program, context: Context) -> Program:
        """Make the planned blocks smaller."""
        entries = {name: entry for name, entry in context.plan.entries.items() if is_module(entry)}
        smaller = make_smaller(program, entries, context.calibration)
        rows = []
        for name, entry in smaller.entries.items():
            fit = smaller.fits[name]
            rows.append(
                SiteRow(
                    name=name,
                    form=str(entry.form),
                    shape=fit.shape,
                    bytes_before=entry.bytes_before,
                    bytes_after=entry.bytes_after,
                    flops_before=entry.flops_before,
                    flops_after=entry.flops_after,
                    predicted_error=fit.predicted_error,
                    measured_error=fit.measured_error,
                    weight_error=fit.weight_error,
                    parts=smaller.parts[name],
                )
            )
        context.notes[self.name] = rows
        context.notes["blocks"] = smaller
        context.calibration = smaller.calibration
        return smaller.program
