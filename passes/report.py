"""`Report`: what happened, predicted beside measured, as data; rendered as a table, JSON or a page."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from recast.passes.cache import Fitted
from recast.passes.plan import Entry, Skip
from recast.patterns.linear.find import Matrix

__all__ = ["Report", "SiteRow", "fidelity"]


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One rewritten site (or part of a packed one).

    Parameters
    ----------
    name, form
        What was rewritten, into what.
    shape
        ``(out_features, in_features)``.
    bytes_before, bytes_after
        Of the weight.
    flops_before, flops_after
        For one token.
    predicted_error, measured_error
        Relative error of the site's output on calibration data: from the Gram matrix, and by running the operator on the
        sample; without calibration the weight's error stands for the first and the second is None.
    weight_error
        ``|W - W'| / |W|``, measured.
    spectrum
        Some singular values of the weight, largest first, relative to the largest (for the picture).
    kernel
        What the target runs it with; filled by lowering.
    parts
        For a block, the linears that were made anew: smaller ones, of which there may be rows besides.
    same_as
        The site whose operator is computed for this one too: experts that share a matrix.
    """

    name: str
    form: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    predicted_error: float
    measured_error: float | None
    weight_error: float
    spectrum: tuple[float, ...] = ()
    kernel: str = "torch"
    parts: tuple[str, ...] = ()
    same_as: str = ""

    @staticmethod
    def of(entry: Entry, matrix: Matrix, fitted: Fitted, *, pictures: bool) -> SiteRow:
        """Row of a fitted operator."""
        return SiteRow(
            name=entry.name,
            form=str(entry.form),
            shape=matrix.shape,
            bytes_before=matrix.nbytes,
            bytes_after=fitted.operator.nbytes,
            flops_before=2 * matrix.shape[0] * matrix.shape[1],
            flops_after=fitted.operator.cost(1).flops,
            predicted_error=fitted.predicted_error,  # the plan may have been edited since it predicted
            measured_error=fitted.measured_error,
            weight_error=fitted.weight_error,
            spectrum=_spectrum(matrix.read()) if pictures else (),
        )


def _spectrum(matrix: Tensor, points: int = 48) -> tuple[float, ...]:
    if min(matrix.shape) > 2048:
        return ()  # a picture is not worth minutes
    small = (
        matrix.double() @ matrix.double().T
        if matrix.shape[0] <= matrix.shape[1]
        else matrix.double().T @ matrix.double()
    )
    values = torch.linalg.eigvalsh(small).clamp_min(0).sqrt().flip(0)
    top = float(values[0]) or 1.0
    picked = torch.linspace(0, len(values) - 1, min(points, len(values))).round().long()
    return tuple(float(f"{v / top:.4g}") for v in values[picked].tolist())


@dataclasses.dataclass
class Report:
    """What a rewrite did.

    Parameters
    ----------
    model
        Label of the program.
    rows
        Rewritten sites.
    skipped
        Sites that stay dense, and why.
    bytes_before, bytes_after
        Of the whole program's weights.
    coverage
        `Coverage.to_dict` of the program.
    whole
        Error of the whole model's outputs on the first calibration batch: `fidelity` for each output; empty without.
    passes
        ``{pass: {"soundness", "verified", "note"}}`` in order.
    target
        What it was lowered to.
    notes
        What capture decided on the way, and what the plan was made with too little of.
    agreement
        Of each output on the target with the eager rewritten program's: `fidelity`; empty where it was not checked.
    """

    model: str
    rows: list[SiteRow]
    skipped: list[Skip]
    bytes_before: int
    bytes_after: int
    coverage: dict[str, Any] = dataclasses.field(default_factory=dict)
    whole: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    passes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    target: str = "eager"
    notes: list[str] = dataclasses.field(default_factory=list)
    agreement: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> tuple[int, int]:
        """Operations a token of what was rewritten, before and after."""
        # A linear of a block that was rewritten once more has been counted there, as it was between.
        inner = {part for row in self.rows for part in row.parts}
        between = sum(r.flops_before for r in self.rows if r.name in inner or r.name.rpartition(".")[0] in inner)
        return (
            sum(r.flops_before for r in self.rows) - between,
            sum(r.flops_after for r in self.rows) - between,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form (see the design's interface)."""
        return {
            "model": self.model,
            "target": self.target,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "flops_per_token": dict(zip(("before", "after"), self.flops, strict=True)),
            "coverage": self.coverage,
            "whole_model": self.whole,
            "agreement": self.agreement,
            "passes": self.passes,
            "sites": [_row(r) for r in self.rows],
            "skipped": [dataclasses.asdict(s) for s in self.skipped],
            "notes": list(self.notes),
        }

    def on(self, target: str, kernels: dict[str, str]) -> Report:
        """The same report for a target, with the kernel that each site got."""
        rows = [dataclasses.replace(r, kernel=_kernel(r.same_as or r.name, kernels)) for r in self.rows]
        return dataclasses.replace(self, rows=rows, target=target)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """The report that `to_dict` described."""
        lists: list[dict[str, Any]] = data["sites"]
        sites: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()} for r in lists]
        rows = [SiteRow(**site) for site in sites]
        return Report(
            model=data["model"],
            rows=rows,
            skipped=[Skip(**s) for s in data["skipped"]],
            bytes_before=data["bytes"]["before"],
            bytes_after=data["bytes"]["after"],
            coverage=data["coverage"],
            whole=data["whole_model"],
            passes=data["passes"],
            target=data["target"],
            notes=list(data.get("notes", [])),
            agreement=data.get("agreement", {}),
        )

    def __str__(self) -> str:
        from recast.passes.render import table_text

        return table_text(self)


def _kernel(name: str, kernels: dict[str, str]) -> str:
    """Kernel of a site, or of the packed site that a part belongs to."""
    return kernels.get(name) or kernels.get(name.rpartition(".")[0]) or "torch"


def _row(row: SiteRow) -> dict[str, Any]:
    data = dataclasses.asdict(row)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def fidelity(reference: Tensor, found: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """How near one output is to another: relative error, largest difference, mean and worst cosine of the last axis.

    Where `mask` has the sizes of an output but for its last one, as an ``attention_mask`` of words has, places where it is zero
    do not count: what a model makes of padding is nobody's answer.

    Examples
    --------
    >>> import torch
    >>> fidelity(torch.eye(2), torch.eye(2))["relative_error"]
    0.0
    """
    a, b = reference.detach().double(), found.detach().double()
    if mask is not None and a.ndim and a.shape[:-1] == mask.shape and bool(mask.any()):
        a, b = a[mask.bool()], b[mask.bool()]
    gap = a - b
    norm = float(a.norm())
    result = {
        "relative_error": float(gap.norm()) / norm if norm else float(gap.norm()),
        "max_difference": float(gap.abs().max()) if gap.numel() else 0.0,
    }
    if a.ndim and a.numel():
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        result["mean_cosine"], result["worst_cosine"] = float(cosine.mean()), float(cosine.min())
    return result
