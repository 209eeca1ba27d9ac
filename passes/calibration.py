"""`Calibration`: statistics of what flows into each site of one program, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast.passes.forms.stats import Stats
from recast.passes.recipe import Recipe
from recast.patterns.errors import CalibrationError
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program, tensor_digest

__all__ = ["Calibration"]

_FORMAT = "recast-calibration-1"


@dataclasses.dataclass
class Calibration:
    """What flows into each site of one program.

    Parameters
    ----------
    fingerprint
        Of the program it was gathered on.
    groups
        Statistics by group; sites that read the same value share one.
    members
        Group of each site, by site name.
    probe
        Flat inputs of the first batch, kept to measure the whole model on.
    weights
        Digest of each site's parameter.
    importance
        Fisher information of each site's rows and columns, and of those of its parts, where a loss was given.
    behind
        Digest of the recipe whose rewritten sites these statistics were gathered behind; empty for the model as it is.
    drift
        Of each numbered layer but the last, where it was asked for: the Kullback-Leibler divergence of the next one's output
        distribution from its own, in nats.
    """

    fingerprint: str
    groups: dict[str, Stats]
    members: dict[str, str]
    probe: list[Any] = dataclasses.field(default_factory=list)
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    importance: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    behind: str = ""
    drift: dict[str, float] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Calibration of {len(self.members)} sites on {self.tokens:,} tokens, program {self.fingerprint[:12]}>"

    def __getitem__(self, site: str) -> Stats:
        return self.of(site)

    def of(self, site: str, part: str = "") -> Stats:
        """Statistics of a site's inputs, with the importances of its weight, or of the rows that are one part of it."""
        stats = self.groups[self.members[site]]
        rows, columns = self.importance.get(f"{site}.{part}" if part else site, (None, None))
        return stats if rows is None else dataclasses.replace(stats, row_importance=rows, column_importance=columns)

    def __contains__(self, site: object) -> bool:
        return site in self.members

    @property
    def tokens(self) -> int:
        """Vectors seen by the site that saw most."""
        return max((s.tokens for s in self.groups.values()), default=0)

    @property
    def hash(self) -> str:
        """Digest of the statistics, whatever model they belong to; 16 hex digits."""
        text = "".join(f"{name}{stats.hash}" for name, stats in sorted(self.groups.items()))
        text += "".join(f"{name}{self.of(name).hash}" for name in sorted(self.members) if name in self.importance)
        text += "".join(f"{name}{value!r}" for name, value in sorted(self.drift.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, program: Program, recipe: Recipe | None = None) -> None:
        """Raise CalibrationError unless these statistics were gathered on this very model, and serve plans by this recipe."""
        if self.behind and recipe is not None and recipe.digest != self.behind:
            raise CalibrationError(
                f"calibration: these statistics were gathered behind sites rewritten by recipe {self.behind}, this is recipe "
                f"{recipe.digest}; plan with that one, or calibrate with recipe=... this one or none"
            )
        found = program.fingerprint()
        if found != self.fingerprint:
            raise CalibrationError(
                f"calibration: these statistics belong to model {self.fingerprint}, this is model {found} "
                f"({program.label}); calibrate this model, recast.calibrate(program, batches)"
            )

    def restrict(self, program: Program) -> Calibration:
        """The statistics that concern one graph of this model, as `torch.compile` cuts it.

        Raises
        ------
        CalibrationError
            A weight differs from the one the statistics were gathered with.
        """
        members = {}
        for site in find_linear(program)[0]:
            if site.name not in self.members:
                continue
            weight = program.weights[site.weights[0]]
            released = weight.untyped_storage().nbytes() == 0
            if not released and self.weights.get(site.name) != tensor_digest(weight, sample=4096):
                raise CalibrationError(
                    f"calibration: the weight of '{site.name}' is not the one these statistics were gathered with; calibrate this model"
                )
            members[site.name] = self.members[site.name]
        groups = {group: self.groups[group] for group in members.values()}
        return Calibration(
            program.fingerprint(), groups, members, [], self.weights, self.importance, self.behind, self.drift
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write statistics as one safetensors file, under a temporary name first."""
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, stats in self.groups.items():
            counts[name] = stats.tokens
            for field in ("gram", "mean", "absmax", "sample", "sizes", "cross", "ranges"):
                value = getattr(stats, field)
                if value is not None:
                    tensors[f"{name}/{field}"] = value.contiguous()
        for name, (rows, columns) in self.importance.items():
            tensors[f"importance/{name}/rows"], tensors[f"importance/{name}/columns"] = rows, columns
        constants = {}
        for i, value in enumerate(self.probe):
            if isinstance(value, Tensor):
                tensors[f"probe/{i}"] = value.detach().clone().contiguous()
            else:
                constants[str(i)] = value if isinstance(value, bool | int | float | str) else None
        meta = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "members": json.dumps(self.members),
            "tokens": json.dumps(counts),
            "weights": json.dumps(self.weights),
            "drift": json.dumps(self.drift),
            "behind": self.behind,
            "probe": json.dumps({"length": len(self.probe), "constants": constants}),
        }
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=meta)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        CalibrationError
            The file is missing, damaged, or no calibration.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"calibration: '{path}' cannot be read: {error}; gather it again with recast.calibrate"
            ) from error
        if meta.get("format") != _FORMAT:
            raise CalibrationError(
                f"calibration: '{path}' is not a calibration file ({_FORMAT}); gather it with recast.calibrate"
            )
        try:
            return Calibration._restore(meta, tensors)
        except (KeyError, ValueError, TypeError) as error:
            raise CalibrationError(
                f"calibration: '{path}' cannot be read ({type(error).__name__}: {error}); "
                "gather it again with recast.calibrate"
            ) from error

    @staticmethod
    def _restore(meta: dict[str, str], tensors: dict[str, Tensor]) -> Calibration:
        counts: dict[str, int] = json.loads(meta["tokens"])
        groups = {
            name: Stats(
                gram=tensors.get(f"{name}/gram"),
                mean=tensors[f"{name}/mean"],
                absmax=tensors[f"{name}/absmax"],
                tokens=count,
                sample=tensors.get(f"{name}/sample"),
                sizes=tensors.get(f"{name}/sizes"),
                cross=tensors.get(f"{name}/cross"),
                ranges=tensors.get(f"{name}/ranges"),
            )
            for name, count in counts.items()
        }
        described = json.loads(meta["probe"])
        probe = [tensors.get(f"probe/{i}", described["constants"].get(str(i))) for i in range(described["length"])]
        members, weights = json.loads(meta["members"]), json.loads(meta["weights"])
        drift = {str(name): float(value) for name, value in json.loads(meta.get("drift", "{}")).items()}
        start, end = "importance/", "/rows"
        weighed = {
            name: (tensors[f"{start}{name}/rows"], tensors[f"{start}{name}/columns"])
            for name in (k[len(start) : -len(end)] for k in tensors if k.startswith(start) and k.endswith(end))
        }
        behind = meta.get("behind", "")
        return Calibration(meta["fingerprint"], groups, members, probe, weights, weighed, behind, drift)
