"""Calibration: statistics of what flows into each site, gathered by running the program once over some batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from recast.passes.forms.stats import Stats
from recast.passes.progress import track
from recast.patterns.errors import CalibrationError
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program, tensor_digest
from recast.patterns.sites import LinearSite, Use

__all__ = ["Calibration", "calibrate"]

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
    """

    fingerprint: str
    groups: dict[str, Stats]
    members: dict[str, str]
    probe: list[Any] = dataclasses.field(default_factory=list)
    weights: dict[str, str] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Calibration of {len(self.members)} sites on {self.tokens:,} tokens, program {self.fingerprint[:12]}>"

    def __getitem__(self, site: str) -> Stats:
        return self.groups[self.members[site]]

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
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, program: Program) -> None:
        """Raise CalibrationError unless these statistics were gathered on this very model."""
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
        return Calibration(program.fingerprint(), groups, members, [], self.weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write statistics as one safetensors file, under a temporary name first."""
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, stats in self.groups.items():
            counts[name] = stats.tokens
            for field in ("gram", "mean", "absmax", "sample"):
                value = getattr(stats, field)
                if value is not None:
                    tensors[f"{name}/{field}"] = value.contiguous()
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
            )
            for name, count in counts.items()
        }
        described = json.loads(meta["probe"])
        probe = [tensors.get(f"probe/{i}", described["constants"].get(str(i))) for i in range(described["length"])]
        return Calibration(meta["fingerprint"], groups, json.loads(meta["members"]), probe, json.loads(meta["weights"]))


class _Running:
    """Statistics being gathered: one pass, memory bounded by the Gram matrix and a small sample."""

    def __init__(self, features: int, sample: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.absmax = torch.zeros(features, dtype=torch.float64)
        self.tokens = 0
        self.wanted = sample
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        vectors = x.detach().reshape(-1, x.shape[-1])
        for chunk in vectors.split(8192):  # type: ignore[no-untyped-call]  # bounds the float64 copy
            wide = chunk.double().cpu()
            self.gram.addmm_(wide.T, wide)
            self.total += wide.sum(0)
            if len(wide):
                self.absmax = torch.maximum(self.absmax, wide.abs().amax(0))
        # An even sample of each batch, thinned so that all batches stay represented.
        step = max(1, len(vectors) // self.wanted)
        self.kept.append(vectors[::step][: self.wanted].cpu().clone())
        self.tokens += len(vectors)
        if sum(map(len, self.kept)) > 2 * self.wanted:
            self.kept = [_thin(torch.cat(self.kept), self.wanted)]

    def stats(self) -> Stats:
        sample = _thin(torch.cat(self.kept), self.wanted) if self.kept else None
        return Stats(self.gram, self.total / max(1, self.tokens), self.absmax, self.tokens, sample)


def _thin(rows: Tensor, count: int) -> Tensor:
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).long()].clone()


def calibrate(
    program: Program, batches: Iterable[Any], *, sample: int = 256, progress: bool | None = None
) -> Calibration:
    """Gather the statistics of every site's inputs in one pass over some batches.

    Parameters
    ----------
    program
        As captured, before rewriting.
    batches
        Inputs of the model: each a tuple of positional arguments, a dict of keyword arguments, or one tensor. Streamed.
    sample
        How many input vectors of each site are kept, to measure errors on.
    progress
        Show a progress bar; by default on a terminal.

    Returns
    -------
    Calibration
        Gram matrices (float64, not divided by the number of tokens), means, largest values, and a sample.

    Raises
    ------
    CalibrationError
        No batch was given, one does not fit the program's inputs, or activations are not finite.

    Examples
    --------
    >>> import torch, recast
    >>> program = recast.capture(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), (torch.randn(3, 8),))
    >>> recast.calibrate(program, [torch.randn(5, 8), torch.randn(6, 8)])["0"].tokens
    11
    """
    sites, _ = find_linear(program)
    points = _points(sites)
    running = {key: _Running(use.features, sample) for key, use in points.items()}
    probe: list[Any] = []
    count = 0
    for batch in track(batches, "calibrating", progress):
        leaves = _leaves(program, batch, count)
        if not count:
            probe = leaves
        with torch.no_grad():
            try:
                _Collector(program, points, running).run(*leaves)
            except CalibrationError as error:  # torch adds where in its graph it was, in many lines
                raise CalibrationError(str(error.args[0]).split("\n")[0]) from None
        count += 1
    if not count:
        raise CalibrationError(
            "calibration: no batch was given; a handful of real inputs would do (a list of tensors, tuples or dicts)"
        )
    groups = {}
    members = {}
    for key, point in points.items():
        stats = running[key].stats()
        if stats.tokens == 0:
            continue
        groups[point.sites[0]] = stats
        members.update(dict.fromkeys(point.sites, point.sites[0]))
    if not groups and sites:
        raise CalibrationError("calibration: the batches hold no token at all; give inputs with at least one")
    held = program.weights
    digests = {site.name: tensor_digest(held[site.weights[0]], sample=4096) for site in sites}
    return Calibration(program.fingerprint(), groups, members, probe, digests)


@dataclasses.dataclass
class _Point:
    """A value of the graph whose arrangement as vectors feeds some sites."""

    uses: list[Use]
    features: int
    sites: list[str]


def _points(sites: list[LinearSite]) -> dict[Any, _Point]:
    """Group sites that read exactly the same vectors, so that one Gram matrix serves them all."""
    uses_of = {
        site.name: tuple(
            (
                use.x,
                use.contraction.x,
                use.contraction.inputs,
                use.contraction.free,
                use.index,
                use.routing and (use.routing.index, use.routing.letters, use.routing.y),
            )
            for use in site.uses
        )
        for site in sites
    }
    points: dict[Any, _Point] = {}
    for site in sites:
        key = uses_of[site.name]
        point = points.setdefault(key, _Point(list(site.uses), site.in_features, []))
        point.sites.append(site.name)
    return points


class _Collector(fx.Interpreter):
    """Runs the program and hands each site's input over as it is computed."""

    def __init__(self, program: Program, points: Mapping[Any, _Point], running: Mapping[Any, _Running]) -> None:
        super().__init__(program.module)
        self.wanted: dict[fx.Node, list[tuple[Use, Any]]] = {}
        self.running = running
        self.names = {key: point.sites[0] for key, point in points.items()}
        for key, point in points.items():
            for use in point.uses:
                # Which rows an expert sees may be known only when its product is computed.
                place = use.x if use.routing is None else use.product
                self.wanted.setdefault(place, []).append((use, key))
        self.routes: dict[fx.Node, Tensor | None] = {
            use.routing.index: None for point in points.values() for use in point.uses if use.routing is not None
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.routes:
            self.routes[n] = value
        for use, key in self.wanted.get(n, ()):
            if use.routing is None:
                vectors = use.contraction.arrange(value, use.index)
            else:
                vectors = _routed(use, self.env[use.x], self.routes[use.routing.index])
            if not bool(torch.isfinite(vectors).all()):
                raise CalibrationError(
                    f"calibration: what flows into {self.names[key]} is not finite in this batch; {_culprit(self.module)}"
                )
            self.running[key].add(vectors)
        return value


def _routed(use: Use, x: Tensor, route: Tensor | None) -> Tensor:
    """The vectors that an expert multiplies."""
    routing, contraction = use.routing, use.contraction
    assert routing is not None
    assert route is not None
    if routing.kind == "grouped":
        ends = [0, *route.tolist()]
        return x[ends[use.index or 0] : ends[(use.index or 0) + 1]]
    vectors = contraction.arrange(x)  # (free..., in_features); those rows count that one of their numbers sends here
    mine: Tensor = route.remainder(routing.count).eq(use.index or 0)
    letters = routing.letters
    for d in routing.letters:
        if d not in contraction.free:
            mine, letters = mine.any(letters.index(d)), letters.replace(d, "")
    mine = mine.permute(sorted(range(len(letters)), key=lambda k: contraction.free.index(letters[k])))
    for i, d in enumerate(contraction.free):
        if d not in letters:
            mine = mine.unsqueeze(i)
        elif vectors.shape[i] == 1:
            mine = mine.any(i, keepdim=True)
    return vectors[mine.expand(vectors.shape[:-1])]


def _culprit(module: nn.Module) -> str:
    """Where values that are not finite may come from: a weight that is not finite itself, or the data."""
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        # Masks hold infinities on purpose, NaN never.
        if weight.is_floating_point() and bool(weight.isnan().any()):
            return f"the weight '{name}' holds NaN; repair it"
    return "check the batch for NaN or infinity, or calibrate in float32"


def _leaves(program: Program, batch: Any, number: int) -> list[Any]:
    try:
        if isinstance(batch, Tensor):
            leaves = program.flatten(batch)
        elif isinstance(batch, Mapping):
            leaves = program.flatten(**batch)
        else:
            leaves = program.flatten(*batch)
    except TypeError as error:
        raise CalibrationError(
            f"calibration: batch {number} does not fit the program: {error}. A batch is a tensor, a tuple of the positional "
            "inputs, or a dictionary of all inputs by name"
        ) from error
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise CalibrationError(
                f"calibration: batch {number} holds NaN or infinite values; leave it out or repair it"
            )
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise CalibrationError(f"calibration: batch {number} is empty (shape {tuple(leaf.shape)}); leave it out")
    return leaves
