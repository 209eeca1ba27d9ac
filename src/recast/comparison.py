"""Models and artifacts side by side on the same data: fidelity to the first, size and time, in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recast.models import Model
from recast.passes.progress import track
from recast.patterns.errors import CalibrationError, RecastError

__all__ = ["Agreement", "compare", "interleaved"]

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


@dataclasses.dataclass
class Agreement:
    """How near one model's output is to another's, gathered batch by batch.

    Examples
    --------
    >>> import torch
    >>> agreement = Agreement()
    >>> agreement.add(torch.eye(3), torch.eye(3))
    >>> agreement.to_dict()["worst_cosine"]
    1.0
    """

    gap: float = 0.0
    norm: float = 0.0
    largest: float = 0.0
    cosines: float = 0.0
    vectors: int = 0
    worst: float = float("inf")

    def add(self, reference: Tensor, found: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch; where `mask` covers the leading dimensions, only its nonzero places count."""
        a, b = reference.detach().double(), found.detach().double()
        if mask is not None and a.ndim == mask.ndim + 1 and a.shape[:-1] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        if a.numel() == 0:
            return
        difference = a - b
        self.gap += float(difference.square().sum())
        self.norm += float(a.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).reshape(-1)
        cosine = torch.where(difference.reshape(len(cosine), -1).abs().amax(-1) == 0, torch.ones_like(cosine), cosine)
        self.cosines += float(cosine.sum())
        self.vectors += cosine.numel()
        self.worst = min(self.worst, float(cosine.min()))

    def to_dict(self) -> dict[str, float]:
        """JSON-able figures; empty where nothing was added."""
        if not self.vectors:
            return {}
        return {
            "mean_cosine": self.cosines / self.vectors,
            "worst_cosine": self.worst,
            "relative_error": (self.gap / self.norm) ** 0.5 if self.norm else self.gap**0.5,
            "max_difference": self.largest,
        }


def interleaved(
    runs: Mapping[str, Run],
    batch: Mapping[str, Tensor],
    *,
    rounds: int,
    progress: bool | None = None,
    warm: bool = False,
) -> dict[str, float]:
    """Median milliseconds of each contestant on one batch, taken in turns, so that all see the same machine.

    Parameters
    ----------
    runs
        What to time, by name; each is run twice before, which compiles what compiles, unless `warm`.
    batch
        Inputs.
    rounds
        Timed turns.
    progress
        Show a progress bar; by default on a terminal.
    """
    for run in track([] if warm else list(runs.values()), "warming up", progress):
        run(batch)
        run(batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(rounds), "timing", progress):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
            start = time.perf_counter()
            runs[name](batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def compare(
    models: Sequence[Model], batches: Sequence[Mapping[str, Tensor]], *, rounds: int = 7, progress: bool | None = None
) -> list[dict[str, Any]]:
    """Rows ``name, target, bytes, milliseconds, fidelity``, the first model being the reference.

    ``fidelity`` is that of the floating output with the largest relative error; where there are several, it has its position
    as ``output``, and ``outputs`` has all of them. A model that fails on the data gets a row with ``error`` in place of
    figures.

    Raises
    ------
    CalibrationError
        The first model, or none of the others, runs on the data.
    """
    reference: list[list[Tensor]] = []
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    for position, model in enumerate(track(models, "running", progress)):
        row: dict[str, Any] = {"name": model.label, "target": model.target, "bytes": model.nbytes}
        row |= {"milliseconds": None, "fidelity": {}}
        rows.append(row)
        agreements: list[Agreement] = []
        try:
            for i, batch in enumerate(batches):
                found = [t for t in model.run(batch) if t.is_floating_point()]
                if not position:
                    reference.append(found)
                _agree(agreements, reference[i], found, batch.get("attention_mask"))
        except (RecastError, RuntimeError, TypeError, KeyError, ValueError) as error:
            if not position or isinstance(error, RecastError):
                raise CalibrationError(
                    f"compare: '{model.label}' does not run on the data: {_first_line(error)}"
                ) from error
            row["error"] = _first_line(error)
            continue
        row |= _figures(agreements)
        runs[str(position)] = model.run
    times = interleaved(runs, batches[0], rounds=rounds, progress=progress)
    for key, milliseconds in times.items():
        rows[int(key)]["milliseconds"] = milliseconds
    return rows


def _agree(
    agreements: list[Agreement], reference: Sequence[Tensor], found: Sequence[Tensor], mask: Tensor | None
) -> None:
    if not reference or not found:
        raise ValueError("it gives no floating output")
    # Where one gives more than the other, those that both give.
    for position, (expected, actual) in enumerate(zip(reference, found, strict=False)):
        expected, actual = _last(expected, actual, mask), _last(actual, expected, mask)
        if expected.shape != actual.shape:
            raise ValueError(
                f"its output {position} has shape {tuple(actual.shape)}, the first model's has {tuple(expected.shape)}; "
                "they are not alike"
            )
        if position == len(agreements):
            agreements.append(Agreement())
        agreements[position].add(expected, actual, mask)


def _last(logits: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    """The last token's part of logits (batch, sequence, tokens), where `other` has no more, as decoders in ONNX give it."""
    alone = other.ndim == logits.ndim == 3 and other.shape == (logits.shape[0], 1, logits.shape[2])
    if mask is None or not alone or mask.shape != logits.shape[:2]:
        return logits
    places = (mask * torch.arange(mask.shape[1])).argmax(-1)
    return logits[torch.arange(len(logits)), places].unsqueeze(1)


def _figures(agreements: Sequence[Agreement]) -> dict[str, Any]:
    outputs = [agreement.to_dict() for agreement in agreements]
    worst = max(range(len(outputs)), key=lambda i: outputs[i].get("relative_error", -1.0))
    if len(outputs) == 1:
        return {"fidelity": outputs[0]}
    return {"fidelity": {**outputs[worst], "output": worst}, "outputs": outputs}


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
