"""Whether what a target runs is what the eager program computes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.passes.calibrate import Calibration
from recast.passes.report import Report, fidelity
from recast.passes.verify import coarsest_dtype, exact_bound, probe_inputs
from recast.patterns.errors import VerificationError

if TYPE_CHECKING:
    from recast.lowering.artifact import Artifact

__all__ = ["agree"]


def agree(artifact: Artifact, calibration: Calibration | None = None) -> Report:
    """Run an artifact beside the eager rewritten program on one batch.

    A target orders sums differently, which is allowed what an exact pass is (see `exact_bound`). One that rounds activations
    to 8 bits in its own way (ONNX Runtime's unsigned ones, a scale for the whole tensor) errs otherwise than the eager program
    does, though by no more: both may be twice as far from each other as the eager one is from the original model.

    Parameters
    ----------
    artifact
        As `recast.lower` gave it.
    calibration
        Its first batch is used; random inputs without one.

    Returns
    -------
    Report
        The artifact's, with the fidelity of each output.

    Raises
    ------
    VerificationError
        They do not agree.
    """
    program, report = artifact.program, artifact.report
    probe = calibration.probe if calibration is not None and calibration.probe else probe_inputs(program)
    if program.decoder is not None:
        # GroupQueryAttention takes several tokens after others for one text at a time, and leaves open what padding gives.
        probe = [leaf[:1] if isinstance(leaf, Tensor) else leaf for leaf in probe]
        place = [node.target for node in program.inputs()].index("attention_mask")
        probe[place] = torch.ones_like(probe[place])
    with torch.no_grad():
        wanted = artifact.lowering.computes(program).module(*[v.clone() if isinstance(v, Tensor) else v for v in probe])
        found = artifact.runner(list(probe))
    slack = exact_bound(coarsest_dtype(program))
    figures: dict[str, dict[str, float]] = {}
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        name = f"output {i}"
        if a.shape != b.shape:
            raise VerificationError(
                f"target '{artifact.target}': {name} has shape {tuple(b.shape)}, the eager program gives {tuple(a.shape)}"
            )
        finite = torch.isfinite(a)
        figures[name] = fidelity(torch.where(finite, a, 0), torch.where(finite, b, 0))
        bound = slack + 2 * report.whole.get(name, {}).get("relative_error", 0.0)
        error = figures[name]["relative_error"]
        if not error <= bound:  # NaN is no agreement either
            raise VerificationError(
                f"target '{artifact.target}': {name} differs from the eager program by {error:.3g} (relative), "
                f"{bound:.3g} may be rounding; `recast compare` shows both, verification=False keeps the artifact all the same"
            )
    return dataclasses.replace(report, agreement=figures)
