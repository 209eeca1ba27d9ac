"""Fitted operators, kept in memory and on disk between runs and safe against several processes writing at once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from recast.kernels.kept import cache_directory
from recast.passes.errors_of import measured_errors, predicted_errors
from recast.passes.forms.form import Form, NamedForm, check_matrix
from recast.passes.forms.operator import Operator, below, common_tensors, settled
from recast.passes.forms.stats import Stats
from recast.passes.unfinished import kept_in, read_whole, write_whole
from recast.patterns.errors import RecastError, WeightError
from recast.patterns.linear.find import Matrix
from recast.patterns.program import tensor_digest

__all__ = ["Fitted", "OperatorCache", "cache_directory", "sources"]

_VERSION = "3"  # raise it when a fit or a stored layout changes


def sources(form: Form) -> list[str]:
    """Digests of the files that define the forms of other packages named in this one: an edited fit is another fit."""
    known = NamedForm._names
    kinds = [known[name] for name in sorted(set(re.findall(r"[A-Za-z_]\w*", str(form))) & known.keys())]
    return [_source(kind) for kind in kinds if not kind.__module__.startswith("recast.")]


@functools.cache
def _source(kind: type[NamedForm]) -> str:
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else uuid.uuid4().hex
    except OSError:
        return uuid.uuid4().hex  # a class of a notebook, say: known as long as this process runs


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted operator and its errors.

    Parameters
    ----------
    operator
        What was fitted.
    weight_error
        ``|W - W'| / |W|``.
    predicted_error
        Relative error of the output on the calibration data, from its Gram matrix; the weight's error without calibration.
    measured_error
        The same by running the operator on the calibration sample; None without calibration.
    """

    operator: Operator
    weight_error: float
    predicted_error: float
    measured_error: float | None

    @staticmethod
    def of(weight: Tensor, operator: Operator, stats: Stats | None) -> Fitted:
        """Compute the errors of an operator; those of the output against what the fit aimed at."""
        aim = weight if stats is None else stats.regular.aimed(weight)
        weight_error, output_error = predicted_errors(aim, operator, stats)
        predicted = weight_error if output_error is None else output_error
        if aim is not weight:
            weight_error = predicted_errors(weight, operator, None)[0]
        return Fitted(operator, weight_error, predicted, measured_errors(aim, operator, stats))


def _settled(operators: Sequence[Operator]) -> list[Operator]:
    """The same operators with their tensors as a later run reads them from disk, what several hold in common still held once."""
    held = {f"{i}.{name}": t for i, operator in enumerate(operators) for name, t in operator.tensors().items()}
    laid = settled(held)
    return [
        operator.with_tensors(below(laid, str(i)))
        if any(laid[f"{i}.{n}"] is not t for n, t in operator.tensors().items())
        else operator
        for i, operator in enumerate(operators)
    ]


class OperatorCache:
    """Fits each weight once: the key is the weight's content, the form, the statistics and the version.

    A weight whose storage was released after fitting is recognised by its storage.

    Parameters
    ----------
    directory
        Where files go; None keeps operators in memory only.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.memory: dict[str, list[Fitted]] = {}
        self.held: dict[tuple[object, ...], tuple[list[StorageWeakRef], tuple[int, ...], list[Fitted]]] = {}
        self.copies: dict[tuple[object, ...], tuple[StorageWeakRef, int, Tensor]] = {}
        self.fits = 0
        self.hits = 0
        self._counting = threading.Lock()  # sites may be fitted side by side

    @staticmethod
    def default() -> OperatorCache:
        """The cache in `cache_directory`."""
        return OperatorCache(cache_directory())

    def fit(self, matrix: Matrix, form: Form, stats: Stats | None, *, where: str | None = None) -> Fitted:
        """Fitted operator of a weight: from memory, from disk, or fitted now.

        Raises
        ------
        WeightError
            The weight is not finite, or its storage was released before it was ever fitted.
        """
        return self.fit_together([matrix], form, [stats], where=None if where is None else [where])[0]

    def fit_together(
        self,
        matrices: Sequence[Matrix],
        form: Form,
        stats: Sequence[Stats | None],
        *,
        where: Sequence[str] | None = None,
    ) -> list[Fitted]:
        """Fitted operators of a group of weights, which hold in common what their form shares.

        Raises
        ------
        WeightError
            As `fit`.
        """
        asked = (str(form), *sources(form), *(s.hash if s else "-" for s in stats))
        identity = (*(matrix.place for matrix in matrices), *asked)
        version = tuple(matrix.version for matrix in matrices)
        if identity in self.held:
            references, known, fitted = self.held[identity]
            same = version == known or any(matrix.released for matrix in matrices)
            if same and not any(r.expired() for r in references):  # type: ignore[no-untyped-call]
                self._count(hits=len(fitted))
                return fitted
        for i, matrix in enumerate(matrices):
            if matrix.released:
                raise WeightError(
                    f"the dense weight of '{where[i] if where else i}' was released before '{form}' was fitted to it; "
                    "load the model again"
                )
        weights = [matrix.read() for matrix in matrices]
        for i, weight in enumerate(weights):
            check_matrix(weight, f"{form}: the weight at {where[i] if where else i}")
        # Errors are those on the data as it is, also where a fit should not trust it that far.
        seen = [known.regular if known is not None else None for known in stats]
        keys = [self.key(weight, form, known) for weight, known in zip(weights, seen, strict=True)]
        key = keys[0] if len(keys) == 1 else hashlib.sha256("\n".join(keys).encode()).hexdigest()
        found = self.memory.get(key) or self._read(key)
        if found is None:
            with kept_in(self.directory / "unfinished" / key if self.directory else None):
                operators = _settled(form.fit_together(weights, seen, where=where))
            found = [Fitted.of(w, o, s) for w, o, s in zip(weights, operators, stats, strict=True)]
            self._count(fits=len(found))
            self._write(key, found)
        else:
            self._count(hits=len(found))
        self.memory[key] = found
        references = [StorageWeakRef(s) for matrix in matrices for s in matrix.storages]  # type: ignore[no-untyped-call]
        self.held[identity] = (references, version, found)
        return found

    def slices(self, weight: Tensor, numbers: Sequence[int], *, where: str) -> Tensor:
        """Some slices of a weight along its first dimension, copied once and held as long as the weight is in memory.

        Programs that are made of one model have them in common, and later ones when the weight was released.

        Raises
        ------
        WeightError
            The weight was released before they were ever copied.
        """
        storage = weight.untyped_storage()
        identity = (storage._cdata, weight.storage_offset(), tuple(weight.shape), weight.stride(), tuple(numbers))
        version = 0 if weight.is_inference() else weight._version
        released = storage.nbytes() == 0 and weight.numel() > 0
        if identity in self.copies:
            reference, known, copied = self.copies[identity]
            if not reference.expired() and (version == known or released):  # type: ignore[no-untyped-call]
                return copied
        if released:
            raise WeightError(
                f"the dense weight '{where}' was released before the matrices in it that stay dense were copied; "
                "load the model again"
            )
        copied = weight.detach()[list(numbers)]
        self.copies = {key: held for key, held in self.copies.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self.copies[identity] = (StorageWeakRef(storage), version, copied)  # type: ignore[no-untyped-call]
        return copied

    def _count(self, *, fits: int = 0, hits: int = 0) -> None:
        with self._counting:
            self.fits += fits
            self.hits += hits

    @staticmethod
    def key(weight: Tensor, form: Form, stats: Stats | None) -> str:
        """Name under which an operator is kept."""
        known = stats.hash if stats else "-"
        parts = (_VERSION, torch.__version__, tensor_digest(weight), str(form), known, *sources(form))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return self.directory / "operators" / key[:2] / f"{key}.safetensors" if self.directory else None

    def _read(self, key: str) -> list[Fitted] | None:
        path = self._path(key)
        held = None if path is None else read_whole(path)
        if held is None:
            return None  # not there, or damaged on disk: fit again
        tensors, facts = held
        try:
            tensors = settled(tensors)
            tensors |= {name: tensors[other] for name, other in facts["common"].items()}
            return [
                Fitted(Operator.from_config(config, below(tensors, str(i))), *errors)
                for i, (config, errors) in enumerate(facts["operators"])
            ]
        except (RecastError, TypeError, ValueError, KeyError):
            return None  # written by another version: fit again

    def _write(self, key: str, fitted: Sequence[Fitted]) -> None:
        path = self._path(key)
        if path is None:
            return
        held = {f"{i}.{name}": t for i, found in enumerate(fitted) for name, t in found.operator.tensors().items()}
        common = common_tensors(held)
        tensors = {n: t.clone() for n, t in held.items() if n not in common}
        operators = [(f.operator.config(), (f.weight_error, f.predicted_error, f.measured_error)) for f in fitted]
        write_whole(path, tensors, {"operators": operators, "common": common})
