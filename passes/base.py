"""What a pass is: a frozen dataclass with a name, a soundness label, what it requires and ensures; and a pipeline of them."""

from __future__ import annotations

import abc
import dataclasses
import enum
import importlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from recast.patterns.errors import PlanError, nearest
from recast.patterns.plugins import offered
from recast.patterns.program import Program

if TYPE_CHECKING:
    from recast.passes.cache import OperatorCache
    from recast.passes.calibrate import Calibration
    from recast.passes.plan import Plan

__all__ = ["Context", "Pass", "Pipeline", "Soundness"]


class Soundness(enum.Enum):
    """What a pass may do to the numbers.

    ``exact``: same function; only rounding may differ, within a stated number of units in the last place.
    ``bounded``: same function in another precision; the error bound is printed.
    ``lossy``: another function; the error is predicted by the plan and measured.
    """

    EXACT = "exact"
    BOUNDED = "bounded"
    LOSSY = "lossy"


@dataclasses.dataclass
class Context:
    """What passes read besides the program, and where they note what they did.

    Parameters
    ----------
    plan
        Decisions to carry out.
    calibration
        Statistics for data-aware fits, if any.
    cache
        Fitted operators.
    progress
        Whether to show progress bars (None: on a terminal).
    pictures
        Whether to gather what only the report's pictures need (spectra).
    notes
        ``{pass name: what it did}``, filled by the passes.
    jobs
        How many sites are fitted at a time; None for one after another on all cores.
    """

    plan: Plan
    calibration: Calibration | None
    cache: OperatorCache
    progress: bool | None = None
    pictures: bool = True
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    jobs: int | None = None
    _ran: list[tuple[Program, list[Any]]] = dataclasses.field(default_factory=list, init=False, repr=False)

    def outputs(self, program: Program, run: Callable[[], Sequence[Any]]) -> list[Any]:
        """What a program gives on the probe, run once: what comes out of a pass is what the next one starts from.

        The first program and the latest are remembered. None is changed after the pass that made it.
        """
        for known, found in self._ran:
            if known is program:
                return found
        results = list(run())
        self._ran = [*self._ran[:1], (program, results)]
        return results


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite of a program. Fields are its options, and its text form: ``cast{dtype=bf16}``."""

    name: ClassVar[str]
    soundness: ClassVar[Soundness]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    undoes: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Pass.known[cls.name] = cls

    @abc.abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """Rewrite a program; the one given is not changed."""

    def __str__(self) -> str:
        options = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Examples
    --------
    >>> str(Pipeline.parse("raise_sites,apply_forms,cast{dtype=bf16}"))
    'raise_sites,apply_forms,cast{dtype=bf16}'
    """

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(str(p) for p in self.passes)

    @property
    def soundness(self) -> Soundness:
        """The weakest label among the passes."""
        order = list(Soundness)
        return max((p.soundness for p in self.passes), key=order.index, default=Soundness.EXACT)

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Read a pipeline from its text form.

        Raises
        ------
        PlanError
            A pass or an option is unknown.
        """
        discover()
        if not isinstance(text, str):
            raise PlanError(
                f"pipeline: text is needed, such as 'raise_sites,apply_forms', {type(text).__name__} was given"
            )
        if text.count("{") != text.count("}"):
            raise PlanError(f"pipeline: a brace is left open in '{text}'; write options like 'cast{{dtype=bf16}}'")
        found = []
        for name, options in re.findall(r"\s*([a-z_0-9]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)", text):
            if name not in Pass.known:
                raise PlanError(f"pipeline: there is no pass '{name}' in '{text}'; {nearest(name, Pass.known)}")
            kind = Pass.known[name]
            given = dict(part.split("=", 1) for part in options.split(",") if "=" in part)
            fields = {f.name for f in dataclasses.fields(kind)}
            for option in given:
                if option not in fields:
                    raise PlanError(f"pipeline: pass '{name}' has no option '{option}'; {nearest(option, fields)}")
            needed = [
                f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in given
            ]
            if needed:
                raise PlanError(
                    f"pipeline: pass '{name}' in '{text}' needs {', '.join(needed)}, as in '{name}{{{needed[0]}=...}}'"
                )
            found.append(kind(**{k.strip(): _typed(kind, k.strip(), v.strip()) for k, v in given.items()}))
        if ",".join(str(p) for p in found).replace(" ", "") != text.replace(" ", ""):
            raise PlanError(
                f"pipeline: '{text}' cannot be read; write it like 'raise_sites,apply_forms,cast{{dtype=bf16}}'"
            )
        return Pipeline(tuple(found))

    def check(self) -> None:
        """Raise PlanError unless each pass finds what it requires ensured by one before it."""
        have: set[str] = set()
        for step in self.passes:
            missing = [need for need in step.requires if need not in have]
            if missing:
                raise PlanError(
                    f"pipeline: '{step.name}' requires {missing}, which no pass before it in '{self}' ensures"
                )
            have |= set(step.ensures)


def _typed(kind: type[Pass], option: str, text: str) -> Any:
    """An option's value as its default is: text, a truth value or a number."""
    default = next(f.default for f in dataclasses.fields(kind) if f.name == option)
    try:
        if isinstance(default, bool):
            return {"True": True, "False": False}[text]
        return type(default)(text) if isinstance(default, int | float) else text
    except (KeyError, ValueError):
        raise PlanError(
            f"pipeline: option '{option}' of '{kind.name}' is '{text}'; it takes a value like {default!r}"
        ) from None


def discover() -> None:
    """Import every file in ``passes/rules`` and the entry points of the group ``recast.passes``: each registers its passes."""
    package = importlib.import_module("recast.passes.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"recast.passes.rules.{module.name}")
    for _ in offered("recast.passes", "pipeline", PlanError):
        pass
