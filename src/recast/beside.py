"""Lowering in a second process, beside what this one does: exporting and compiling are Python, on one core each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from recast.lowering.artifact import load, lower
from recast.patterns.errors import RecastError, TargetError
from recast.patterns.program import Program

__all__ = ["Beside"]

# Source, target, place; for what is compiled, the file that is made by whoever begins, and the inputs of a call.
_Job = tuple[str, str, str, str | None, dict[str, Tensor]]

_PATIENCE = 10.0  # seconds in which an idle process has surely ended by itself, and one that was told to has


class Beside:
    """A process that lowers programs and saves the artifacts, in the order they are given.

    Use as a context manager; leaving it ends the process, whatever it does. It starts with the first job, or with `start`.
    """

    def __enter__(self) -> Beside:
        self._handed = tempfile.TemporaryDirectory(prefix="recast-beside-")
        self.process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._count = 0
        self._claims: dict[str, str] = {}
        self._answers: dict[str, tuple[str, str]] = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process: let it finish if all went well, and kill it if not."""
        if self._pipe is not None:
            self._pipe.close()  # at the end of the pipe it ends by itself
        if self.process is not None:
            if kind is not None:
                self.process.terminate()
            self.process.join(_PATIENCE)
            self.process.kill()
            self.process.join()
        self._handed.cleanup()

    def hand(self, program: Program) -> Path:
        """Hand over a program, as files; returns where they are."""
        source = Path(self._handed.name) / str(self._count)
        self._count += 1
        lower(program, "eager").save(source)
        return source

    def lower(self, source: Path, target: str, place: Path) -> None:
        """Have a program lowered; returns at once.

        Parameters
        ----------
        source
            What `hand` gave.
        target
            Its name.
        place
            Where the artifact is saved.
        """
        self._send((str(source), target, str(place), None, {}))

    def compile(self, source: Path, target: str, place: Path, inputs: Mapping[str, Tensor]) -> None:
        """Have a program lowered and run once, unless this process gets to `claim` it first; returns at once.

        What is compiled lies in the compiler's cache on disk then, so that running it here takes little time.

        Parameters
        ----------
        source, target, place
            As for `lower`.
        inputs
            Keyword arguments of a call.
        """
        claim = str(Path(self._handed.name) / f"{self._count}.claimed")
        self._count += 1
        self._claims[str(place)] = claim
        self._send((str(source), target, str(place), claim, dict(inputs)))

    def claim(self, place: Path) -> bool:
        """Whether this process may do what `compile` asked for; if not, the other one has begun it, and is waited for."""
        return _claimed(self._claims[str(place)])

    def start(self) -> None:
        """Start the process ahead of the first job, so that it imports what it needs meanwhile."""
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
            self._pipe, other = context.Pipe()
            self.process = context.Process(target=_work, args=(other, torch.get_num_threads()), daemon=True)
            self.process.start()
            other.close()

    def _send(self, job: _Job) -> None:
        self.start()
        assert self._pipe is not None
        with contextlib.suppress(ConnectionError):  # `wait` tells of a process that ended
            self._pipe.send(job)

    def wait(self, place: Path) -> None:
        """Wait for the artifact that is saved there.

        Raises
        ------
        TargetError
            The target cannot express something, or the process ended.
        RecastError
            The artifact could not be written.
        """
        assert self._pipe is not None
        while str(place) not in self._answers:
            try:
                done, name, message = self._pipe.recv()
            except (EOFError, ConnectionError):
                raise TargetError("target: the process that lowers ended early, perhaps for want of memory") from None
            self._answers[done] = (name, message)
        name, message = self._answers[str(place)]
        if name:
            raise (TargetError if name == "TargetError" else RecastError)(message)


def _claimed(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _work(pipe: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what an interrupt ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ending in order leaves no semaphores behind
    while True:
        try:
            job: _Job = pipe.recv()
        except EOFError:
            return
        source, target, place, claim, inputs = job
        if claim is not None and not _claimed(claim):
            continue
        # Compiled code holds the number of threads it is for.
        torch.set_num_threads(1 if claim is None else threads)
        try:
            artifact = lower(load(Path(source)).program, target)
            if claim is not None:
                artifact(**inputs)
            artifact.save(Path(place))
            answer = (place, "", "")
        except Exception as error:  # noqa: BLE001  # told to the process that asked
            answer = (place, type(error).__name__, str(error) if isinstance(error, RecastError) else repr(error))
        pipe.send(answer)
