"""What is asked for: a weight form, an expression over named forms with ``+``, ``@`` and ``|``."""

from __future__ import annotations

import abc
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats, all_finite, squared_error
from recast.patterns.errors import CalibrationError, FormError, RecastError, WeightError, nearest

__all__ = ["Form", "NamedForm", "Parameter", "Together", "check_matrix", "literal"]

Scalar = bool | int | float | str
_FITTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a named form, as the command line shows it."""

    name: str
    type: str
    default: Scalar | None
    help: str


class Form(abc.ABC):
    """A weight form. Frozen, comparable, and written as text: ``Form.parse(str(form)) == form``.

    Examples
    --------
    >>> form = Form.parse("int4(group=64) + low_rank(rank=32)")
    >>> str(form), form == Form.parse("int4(64) + low_rank(32)")
    ('int4(group=64) + low_rank(rank=32)', True)
    """

    # How tightly the text binds: `|` 1, `+` 2, `@` 3, a name 4.
    binding: ClassVar[int] = 4

    # Of the sites it is for: ``linear``, or a block of several linears.
    site_kind: ClassVar[str] = "linear"

    # True where `solve` with statistics is already the best of its class on the data, so that there is nothing to
    # compare.
    optimal_on_data: ClassVar[bool] = False

    # True where the form is fitted to a group of matrices, which hold a part in common.
    shares: ClassVar[bool] = False

    @property
    def dense_leaves(self) -> bool:
        """Whether what this form makes has dense factors, which a ``|`` may refit."""
        return True

    @property
    def refits(self) -> bool:
        """Whether the form may stand to the right of ``|``."""
        return True

    @property
    def needs_loss(self) -> bool:
        """Whether statistics with the importances of a loss are needed, so that there is no fit without any."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether there is no fit without statistics of the inputs."""
        return self.needs_loss

    @property
    def without_data(self) -> str | None:
        """What is done where there are no statistics of inputs, if that is not what the form's text says; None otherwise.

        Examples
        --------
        >>> Form.parse("int4(rounding='gptq') + low_rank(8)").without_data
        "int4(rounding='gptq') rounds to nearest"
        """
        entries: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values: list[Any] = [getattr(self, entry.name) for entry in entries]
        parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        return next((told for part in parts if isinstance(part, Form) and (told := part.without_data)), None)

    @property
    def wrapper(self) -> bool:
        """Whether the form, as a factor, mixes features rather than carrying the weight: it is square there."""
        return False

    @staticmethod
    def parse(text: str) -> Form:
        """Read a form from text.

        Parameters
        ----------
        text
            An expression: names with parameters, ``@`` (product, binds tightest), ``+`` (sum), ``|`` (what stands right
            is fitted to every dense factor of what stands left; binds loosest), parentheses.

        Raises
        ------
        FormError
            With the text, a mark under the place, and what would work.
        """
        from recast.passes.forms.language import parse

        return parse(text)

    def __add__(self, other: Form) -> Form:
        from recast.passes.forms.composite import SumForm

        return SumForm.of(self, other) if isinstance(other, Form) else NotImplemented

    def __matmul__(self, other: Form) -> Form:
        from recast.passes.forms.composite import ProductForm

        return ProductForm.of(self, other) if isinstance(other, Form) else NotImplemented

    def __or__(self, other: Form) -> Form:
        from recast.passes.forms.composite import PipeForm

        return PipeForm(self, other) if isinstance(other, Form) else NotImplemented

    @abc.abstractmethod
    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        """Raise FormError, saying what would work, unless a weight (m, n) of this shape can take the form."""

    @abc.abstractmethod
    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        """Return the operator that a fit would make, on the meta device; None where the weight's values decide that.

        Its `nbytes`, `cost` and `config` are those of the fitted operator, at no cost.
        """

    @abc.abstractmethod
    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        """Fit a weight that was checked; called by `fit`, which see."""

    def fit(self, weight: Tensor, stats: Stats | None = None, *, where: str | None = None) -> Operator:
        """Find the operator of this form nearest to a weight.

        Parameters
        ----------
        weight
            (m, n), floating and finite. Fits run in float32 or better; the result has the weight's dtype.
        stats
            Statistics of the weight's inputs. With a Gram matrix, ``‖(W - Ŵ)X‖`` is made small in place of ``‖W - Ŵ‖``,
            and the result is never worse on the data than the one without statistics. Behind rewritten sites W is replaced
            by `Stats.aimed`.
        where
            Name of the weight, for messages.

        Raises
        ------
        FormError
            If the form does not go with the shape.
        WeightError
            If the weight is not a finite matrix of 16, 32 or 64 bits, or has no values.
        CalibrationError
            If the statistics are not of this weight's inputs, or not finite.
        """
        weight = self.checked(weight, stats, where)
        aim, seen = weight, stats
        if stats is not None and stats.cross is not None:
            aim, seen = stats.aimed(weight), replace(stats, cross=None)
        operator = self._solved(aim, seen, where)
        alone = self.optimal_on_data or self.needs_data
        if seen is None or seen.gram is None or (alone and aim is weight):
            return operator
        free = self._solved(weight, seen if self.needs_data else None, where)
        return min((operator, free), key=lambda found: data_error(aim, found, seen))

    def _solved(self, weight: Tensor, stats: Stats | None, where: str | None) -> Operator:
        """What `solve` gives, once it is an operator of the weight's shape and dtype."""
        at = f" at {where}" if where else ""
        try:
            made = self.solve(weight, stats)
        except Exception as error:
            # Of a form from elsewhere: who runs a plan should read which one failed, and at what.
            if isinstance(error, CalibrationError) and where and where not in str(error):
                raise CalibrationError(f"{where}: {error}") from error
            if isinstance(error, RecastError):
                raise
            if type(self).__module__.startswith("recast."):
                if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                    raise WeightError(_out_of_range(self, weight, at, str(error).splitlines()[0])) from error
                raise
            raise FormError(
                f"{self}: solve failed{at} on a weight {tuple(weight.shape)} of {weight.dtype}: "
                f"{type(error).__name__}: {error}; repair {type(self).__module__}.{type(self).__qualname__}.solve"
            ) from error
        if not isinstance(made, Operator):
            raise FormError(f"{self}: solve gave a {type(made).__name__}{at}; an Operator, such as Dense, would work")
        lost = next((name for name, t in made.tensors().items() if t.is_floating_point() and not all_finite(t)), None)
        if lost is not None:
            raise WeightError(_out_of_range(self, weight, at, f"{lost!r} of the result is not finite"))
        wanted = (tuple(weight.shape), weight.dtype)
        if (tuple(made.shape), made.dtype) != wanted:
            raise FormError(
                f"{self}: solve gave an operator {tuple(made.shape)} of {made.dtype}{at}; "
                f"{wanted[0]} of {wanted[1]}, as the weight, would work"
            )
        return made

    def checked(self, weight: Tensor, stats: Stats | None, where: str | None = None) -> Tensor:
        """Return the weight without its history, once it, its shape and the statistics are fit for a fit; errors as there."""
        at = f" at {where}" if where else ""
        check_matrix(weight, f"{self}: the weight{at}")
        self.check((weight.shape[0], weight.shape[1]), where)
        if weight.dtype not in _FITTED:
            found = "too coarse to be fitted" if weight.is_floating_point() else "not floating"
            works = "real and imaginary part as two weights" if weight.is_complex() else "weight.float()"
            raise WeightError(f"{self}: the weight{at} is {weight.dtype}, {found}; {works} would work")
        if stats is not None and not isinstance(stats, Stats):
            raise CalibrationError(
                f"{self}: statistics{at} must be recast.passes.forms.stats.Stats, not {type(stats).__name__}; "
                "recast.calibrate(program, batches)[site] gives some, None is for a fit without data"
            )
        weight = weight.detach()
        _refuse_nonfinite(weight, f"{self}: the weight{at}")
        if stats is not None:
            stats.check(weight.shape[1], where)
        return weight

    def checked_together(
        self, weights: Sequence[Tensor], stats: Sequence[Stats | None], where: Sequence[str] | None
    ) -> list[Tensor]:
        """Return several weights as `checked` does."""
        return [
            self.checked(weight, known, None if where is None else where[i])
            for i, (weight, known) in enumerate(zip(weights, stats, strict=True))
        ]

    @property
    def shared_part(self) -> Form | None:
        """The form in this one that is fitted to several matrices at once, if there is one."""
        return self if self.shares else None

    def fit_together(
        self, weights: Sequence[Tensor], stats: Sequence[Stats | None], *, where: Sequence[str] | None = None
    ) -> list[Operator]:
        """Fit several matrices; a form that `shares` holds a part of them in common, others fit each by itself.

        Parameters
        ----------
        weights
            Each (m, n), all of one shape where the form shares.
        stats
            Of each, or None.
        where
            Their names, for messages.

        Raises
        ------
        FormError, WeightError, CalibrationError
            As `fit`.
        """
        pairs = zip(weights, stats, strict=True)
        return [self.fit(w, s, where=None if where is None else where[i]) for i, (w, s) in enumerate(pairs)]

    def __str__(self) -> str:
        raise NotImplementedError


def data_error(weight: Tensor, operator: Operator, stats: Stats | None) -> float:
    """Squared error of an operator, ``‖(W - Ŵ)X‖²``, or ``‖W - Ŵ‖²`` without a Gram matrix."""
    return squared_error(weight, operator.to_dense(), None if stats is None else stats.gram)


def _out_of_range(form: Form, weight: Tensor, at: str, found: str) -> str:
    size = float(weight.abs().max())
    return (
        f"{form}: no fit{at} to a weight {tuple(weight.shape)} of {weight.dtype}, largest value {size:.3g}: {found}; a weight of "
        "moderate size would work, its scale folded into a neighbour"
    )


def check_matrix(weight: object, what: str) -> None:
    """Raise WeightError unless something is a matrix with values."""
    if (problem := _no_matrix(weight)) is not None:
        raise WeightError(f"{what} {problem}")


def _no_matrix(weight: object) -> str | None:
    """Say why something is no matrix with values, and what would work; None if it is one."""
    if not isinstance(weight, Tensor):
        works = "a torch tensor (m, n)" if weight is None else "torch.as_tensor(weight)"
        return f"is {'None' if weight is None else f'a {type(weight).__name__}'}, not a tensor; {works} would work"
    if weight.is_nested:
        return "is a nested tensor; a plain one of two dimensions would work"
    if weight.layout is not torch.strided:
        return f"is held as {weight.layout}, not as a dense matrix; weight.to_dense() would work"
    if weight.is_quantized:
        return f"is quantized already ({weight.dtype}); weight.dequantize() would work"
    if weight.dim() != 2:
        return f"is {tuple(weight.shape)}, and a weight of two dimensions (m, n) is needed; weight.reshape(m, n) would work"
    if 0 in weight.shape:
        return f"is {tuple(weight.shape)}, which is empty; one row and one column or more would work"
    if weight.is_meta or isinstance(weight, FakeTensor):
        return "has a shape but no values (it is on the meta device); a weight on a device, as a checkpoint loads it, would work"
    return None


def _refuse_nonfinite(weight: Tensor, what: str) -> None:
    if all_finite(weight):
        return
    finite = torch.isfinite(weight)
    row, column = (int(i) for i in (~finite).nonzero()[0])
    raise WeightError(
        f"{what} holds {int((~finite).sum())} values that are NaN or infinite, the first at [{row}, {column}]; "
        "repair the checkpoint or leave this weight out"
    )


class NamedForm(Form):
    """A form with a name and parameters, which are the fields of a frozen dataclass with scalar types.

    A subclass that sets `name` registers itself; the file that holds it needs only to stand in ``passes/forms`` or
    behind the entry point group ``recast.forms``.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    _names: ClassVar[dict[str, type[NamedForm]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None:
            return
        taken = NamedForm._names.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"form {name!r} is defined by both {taken.__module__} and {cls.__module__}; another name would work"
            )
        NamedForm._names[name] = cls

    @classmethod
    @abc.abstractmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        """Return a few instances that a weight of this shape can take; the law tests fit each of them."""

    @property
    def fixed_point(self) -> bool:
        """Whether fitting a matrix of this form gives it back, as the law tests expect."""
        return True

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        """Return instances of growing size whose error must not grow; empty where there is no such order."""
        return []

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        """Say what is wrong with a shape, and what would work, or None: ("does not split into 12", "8 would")."""
        return None

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        """Raise FormError, saying what would work, unless a weight (m, n) of this shape can take the form."""
        problem = self.problem(shape)
        if problem is not None:
            found, works = problem
            at = f" at {where}" if where else ""
            raise FormError(f"{self}: weight {tuple(shape)} {found}{at}; {works}")

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """Describe the parameters, in positional order."""
        hints = typing.get_type_hints(cls)
        return [
            Parameter(
                f.name,
                " or ".join(kind.__name__ for kind in _kinds(hints[f.name])),
                None if f.default is dataclasses.MISSING else f.default,
                f.metadata.get("help", ""),
            )
            for f in sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only))  # type: ignore[arg-type]  # it is one
        ]

    @classmethod
    def positional(cls, values: list[Scalar]) -> list[str]:
        """Name the parameters that unnamed values are for; by default the fields in order, but keyword-only ones."""
        return [f.name for f in dataclasses.fields(cls) if not f.kw_only][: len(values)]  # type: ignore[arg-type]

    @classmethod
    def coerce(cls, parameter: str, value: Scalar) -> Scalar:
        """Check a parameter's name and type, making a whole number a float where one is meant; raises FormError."""
        hints = typing.get_type_hints(cls)
        known = [p.name for p in cls.parameters()]
        if parameter not in known:
            hint = nearest(parameter, known) if known else "it takes none"
            raise FormError(f"{cls.name} has no parameter {parameter!r}; {hint}")
        kinds = _kinds(hints[parameter])
        if type(value) in kinds:
            return value
        if float in kinds and type(value) is int:
            return float(value)
        wanted = " or ".join(_KIND_TEXT[kind] for kind in kinds)
        raise FormError(f"{cls.name}: {parameter} is {value!r}; {wanted} would work")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Scalar]) -> NamedForm:
        """Make an instance from parameters by name; raises FormError for a wrong name, type or value."""
        values = {name: cls.coerce(name, value) for name, value in parameters.items()}
        missing = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            needed = ", ".join(f"{name}=..." for name in [*values, *missing])
            raise FormError(f"{cls.name}: parameter {missing[0]!r} is missing; {cls.name}({needed}) would work")
        return cls(**values)

    @classmethod
    def unfinished(cls) -> str | None:
        """Say what the class lacks to be a form, and what would work, or None."""
        if not re.fullmatch(r"[A-Za-z_]\w*", cls.name):
            return "has a name that a form's text cannot hold; letters, digits and '_' would work"
        if cls.__abstractmethods__:
            return f"has no {', '.join(sorted(cls.__abstractmethods__))}; define what NamedForm leaves abstract"
        settings = cls.__dict__.get("__dataclass_params__")
        if settings is None or not settings.frozen:
            return "is no frozen dataclass; @dataclass(frozen=True) above the class would work"
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]  # it is one
            if not all(kind in _KIND_TEXT for kind in _kinds(hints[f.name])):
                return f"has a parameter {f.name!r} of type {f.type}; bool, int, float or str would work"
        return None

    def __str__(self) -> str:
        given = [
            f"{f.name}={literal(getattr(self, f.name))}"
            for f in sorted(dataclasses.fields(self), key=lambda f: bool(f.kw_only))  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name


class Together(NamedForm):
    """A named form that is fitted to several matrices at once, and to one as to a group of one."""

    @abc.abstractmethod
    def solve_together(self, weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> list[Operator]:
        """Fit matrices that were checked; what they share is the same in all of the operators."""

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        """As `Form.solve`."""
        return self.solve_together([weight], [stats])[0]


_KIND_TEXT = {bool: "true or false", int: "a whole number", float: "a number", str: "a 'quoted' text"}


def _kinds(annotation: Any) -> list[type]:
    """List the scalar types that a field's annotation allows, without None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return [annotation]


def literal(value: Scalar) -> str:
    """A value as a form's text holds it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value)
