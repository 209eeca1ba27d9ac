"""Fitted operators, kept in memory and on disk between runs and safe against several processes writing at once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast.passes.forms.form import Form
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import RecastError
from recast.patterns.program import tensor_digest

__all__ = ["OperatorCache", "cache_directory"]

_VERSION = "1"  # raise it when a fit or a stored layout changes


def cache_directory() -> Path | None:
    """Where fitted operators are kept: ``$RECAST_CACHE``, else ``~/.cache/recast``; None if it is set to ``off``."""
    asked = os.environ.get("RECAST_CACHE", "")
    if asked.lower() in ("off", "0", "none"):
        return None
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "recast"


class OperatorCache:
    """Fits each weight once: the key is the weight's content, the form, the statistics and the version.

    Parameters
    ----------
    directory
        Where files go; None keeps operators in memory only.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.memory: dict[str, Operator] = {}
        self.fits = 0
        self.hits = 0

    @staticmethod
    def default() -> OperatorCache:
        """The cache in `cache_directory`."""
        return OperatorCache(cache_directory())

    def fit(self, weight: Tensor, form: Form, stats: Stats | None, *, where: str | None = None) -> Operator:
        """Fitted operator of a weight: from memory, from disk, or fitted now."""
        key = self.key(weight, form, stats)
        found = self.memory.get(key) or self._read(key)
        if found is None:
            found = form.fit(weight.detach(), stats, where=where)
            self.fits += 1
            self._write(key, found)
        else:
            self.hits += 1
        self.memory[key] = found
        return found

    @staticmethod
    def key(weight: Tensor, form: Form, stats: Stats | None) -> str:
        """Name under which an operator is kept."""
        parts = (_VERSION, torch.__version__, tensor_digest(weight), str(form), stats.hash if stats else "-")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return self.directory / "operators" / key[:2] / f"{key}.safetensors" if self.directory else None

    def _read(self, key: str) -> Operator | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if meta.get("digest") != _digest(tensors):
                return None  # damaged on disk: fit again
            return Operator.from_config(json.loads(meta["config"]), tensors)
        except (OSError, SafetensorError, RecastError, ValueError, KeyError):
            return None  # written by another version, or cut short: fit again

    def _write(self, key: str, operator: Operator) -> None:
        path = self._path(key)
        if path is None:
            return
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in operator.tensors().items()}
        meta = {"config": json.dumps(operator.config()), "digest": _digest(tensors)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own, then a rename: another process sees the old state or the whole new file.
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            os.close(handle)
        except OSError:
            return  # a cache that cannot be written costs time, nothing else
        try:
            save_file(tensors, temporary, metadata=meta)
            Path(temporary).replace(path)
        except (OSError, SafetensorError):
            Path(temporary).unlink(missing_ok=True)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_digest(tensor).encode())
    return digest.hexdigest()
