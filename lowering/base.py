"""What a lowering is: a rewritten program in, something that runs out."""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from recast.patterns.errors import TargetError, nearest
from recast.patterns.program import Program

__all__ = ["Lowering", "Runner", "lowering_named", "lowerings"]

Runner = Callable[[list[Any]], list[Any]]  # flat inputs in, flat results out (mutations included)


class Lowering(abc.ABC):
    """One target. A subclass in a folder of its own under ``lowering/`` is discovered by its name.

    Attributes
    ----------
    name
        What users write as ``target``.
    summary
        One line for the command line.
    stores_program
        Whether a saved artifact holds the program itself (weights and graph), or only the lowering's own files.
    compiles
        Whether the first call of an artifact compiles, with a cache on disk that spares other processes the time.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    stores_program: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    known: ClassVar[dict[str, type[Lowering]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Lowering.known[cls.name] = cls

    @classmethod  # noqa: B027  # most targets need nothing
    def installed(cls) -> None:
        """Do nothing if what the target needs is installed; raise TargetError, saying what to install, if not."""

    @abc.abstractmethod
    def prepare(self, program: Program) -> Runner:
        """Make a program run on this target.

        Raises
        ------
        TargetError
            The target is not installed, or cannot express something in the program.
        """

    def computes(self, program: Program) -> Program:
        """What the target was asked to compute, as an eager program: the one it was given, unless an option changes it."""
        return program

    def kernels(self, program: Program) -> dict[str, str]:
        """What runs each site, by site name."""
        return {}

    def notes(self) -> list[str]:
        """What `prepare` chose besides, in words, for the report."""
        return []

    def supports(self, form: Any) -> str | None:
        """None if the target can run a form; else the reason why not."""
        return None

    def write(self, folder: Path) -> None:  # noqa: B027 (most targets have none)
        """Write files of the lowering's own next to the program's."""

    @classmethod
    def read(cls, folder: Path, data: dict[str, Any]) -> tuple[Lowering, Runner]:
        """Restore from `write`'s files, for lowerings that do not store the program."""
        raise TargetError(f"target '{cls.name}' does not load from files of its own")

    def extra(self) -> dict[str, Any]:
        """JSON-able facts that `read` needs."""
        return {}


def lowerings() -> dict[str, type[Lowering]]:
    """Every target there is, by name."""
    package = importlib.import_module("recast.lowering")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"recast.lowering.{module.name}")
    return dict(sorted(Lowering.known.items()))


def lowering_named(name: str) -> type[Lowering]:
    """Target of that name; raises TargetError with the nearest name there is."""
    known = lowerings()
    if name not in known:
        raise TargetError(f"target: there is no target '{name}'; {nearest(name, known)}")
    return known[name]
