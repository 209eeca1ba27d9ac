"""What long searches have reached, kept on disk until the fit that they are part of is done: an interrupted one goes on there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast.patterns.program import tensor_digest

__all__ = ["Unfinished", "kept_in", "read_whole", "unfinished", "write_whole"]


def write_whole(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts (which JSON can hold), so that others see the whole file or none; errors of the disk are passed over.

    What is kept so only saves time: a disk that is full or cannot be written costs a fit anew, nothing else.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"facts": json.dumps(dict(facts)), "digest": _digest(held)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, then a rename: another process sees the old state or the whole new file.
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
    except OSError:
        return
    try:
        save_file(held, temporary, metadata=meta)
        Path(temporary).replace(path)
    except (OSError, SafetensorError):
        Path(temporary).unlink(missing_ok=True)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_whole` wrote; None if nothing is there, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return (tensors, json.loads(meta["facts"])) if meta.get("digest") == _digest(tensors) else None
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_digest(tensor).encode())
    return digest.hexdigest()


class Unfinished:
    """States of the searches of one fit, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of a state; None if there is none."""
        return read_whole(self.folder / f"{name}.safetensors")

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a state in place of the one before."""
        write_whole(self.folder / f"{name}.safetensors", tensors, facts)

    def clear(self) -> None:
        """Forget all states."""
        shutil.rmtree(self.folder, ignore_errors=True)


_here = threading.local()  # sites may be fitted side by side


def unfinished() -> Unfinished | None:
    """Where the search that runs now may keep its state; None if nothing is kept."""
    found: Unfinished | None = getattr(_here, "kept", None)
    return found


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Keep states in a folder while a fit runs, and forget them when it has succeeded; None keeps nothing."""
    before = unfinished()
    _here.kept = None if folder is None else Unfinished(folder)
    try:
        yield
        if _here.kept is not None:
            _here.kept.clear()
    finally:
        _here.kept = before
