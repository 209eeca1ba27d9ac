"""Lowering in a second process, beside what this one does: exports are Python through and through, on one core."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch

from recast.lowering.artifact import load, lower
from recast.patterns.errors import RecastError, TargetError
from recast.patterns.program import Program

__all__ = ["Beside"]

_PATIENCE = 10.0  # seconds in which an idle process has surely ended by itself, and one that was told to has


class Beside:
    """A process that lowers programs and saves the artifacts, in the order they are given.

    Use as a context manager; leaving it ends the process, whatever it does.
    """

    def __enter__(self) -> Beside:
        """Start the process with the first program, not before."""
        self._handed = tempfile.TemporaryDirectory(prefix="recast-beside-")
        self.process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._count = 0
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

    def lower(self, program: Program, target: str, place: Path) -> None:
        """Hand over a program; returns at once.

        Parameters
        ----------
        program
            Handed over as files.
        target
            Its name.
        place
            Where the artifact is saved.
        """
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
            self._pipe, other = context.Pipe()
            self.process = context.Process(target=_work, args=(other,), daemon=True)
            self.process.start()
            other.close()
        source = Path(self._handed.name) / str(self._count)
        self._count += 1
        lower(program, "eager").save(source)
        with contextlib.suppress(ConnectionError):  # `wait` tells of a process that ended
            self._pipe.send((str(source), target, str(place)))

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


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what an interrupt ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ending in order leaves no semaphores behind
    torch.set_num_threads(1)
    while True:
        try:
            source, target, place = pipe.recv()
        except EOFError:
            return
        try:
            lower(load(source).program, target).save(place)
            answer = (place, "", "")
        except Exception as error:  # noqa: BLE001  # told to the process that asked
            answer = (place, type(error).__name__, str(error) if isinstance(error, RecastError) else repr(error))
        pipe.send(answer)
