"""What is held after fitting: a linear operator as a small tree of tensors.

An operator is an immutable description, not a module: a lowering asks it for its tensors and its structure, and builds
what runs. Its own ``apply`` is the meaning every kernel is compared with: plain torch code that traces.
"""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError, nearest

__all__ = [
    "ALIGNMENT",
    "Cost",
    "Dense",
    "Operator",
    "Refit",
    "below",
    "common_tensors",
    "dtype_from_name",
    "dtype_name",
    "holds",
    "identity_of",
    "settled",
    "stripped",
]

ALIGNMENT = 64  # bytes; what torch aligns its own memory to, and matrix libraries look at

Refit = Callable[["Dense", str, "Stats | None"], "Operator"]
Self = TypeVar("Self", bound="Operator")


@dataclass(frozen=True)
class Cost:
    """Arithmetic and memory traffic of one application: `flops` operations and `bytes` read or written."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as JSON holds it, e.g. ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Read what `dtype_name` wrote; raises FormError for anything that is not a floating torch dtype."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FormError(f"operator config: {name!r} is not a floating dtype; float32, bfloat16 or float16 would work")
    return dtype


class Operator(abc.ABC):
    """A linear map from `shape[1]` to `shape[0]` features; y = apply(x) = x @ to_dense().T.

    A subclass names its `kind`, its own tensors, its children and its remaining fields; everything else (dotted tensor
    names, configuration, bytes, refitting of leaves) follows from these.
    """

    kind: ClassVar[str]
    # Set where a product with the operator on the left is better applied than multiplied out.
    applied: ClassVar[bool] = False
    _kinds: ClassVar[dict[str, type[Operator]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = cls.__dict__.get("kind")
        if kind is None:
            return
        taken = Operator._kinds.get(kind)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"operator kind {kind!r} is defined by both {taken.__module__} and {cls.__module__}; "
                "another kind would work"
            )
        Operator._kinds[kind] = cls

    # What a subclass says.

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating dtype in which `to_dense` comes and `apply` computes."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features); the batch dimensions may be symbolic."""

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrix (out_features, in_features) that this operator stands for."""

    @abc.abstractmethod
    def cost(self, tokens: int) -> Cost:
        """Count what applying to `tokens` vectors takes: weights read, activations read and written, flops."""

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this node alone, without its children's."""
        return {}

    def children(self) -> dict[str, Operator]:
        """Return the operators this one is made of, by name."""
        return {}

    def fields(self) -> dict[str, Any]:
        """Return what is neither tensor nor child, JSON-able."""
        return {}

    @classmethod
    @abc.abstractmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        """Make an operator of this kind from the three parts; the inverse of the three methods above."""

    @abc.abstractmethod
    def to(self, dtype: torch.dtype) -> Operator:
        """Return the same operator computing in another floating dtype; quantization scales keep theirs."""

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        """Replace each dense leaf by `fit(leaf, path, statistics of what flows into that leaf)`."""
        return self

    # What follows from it.

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by dotted name, e.g. ``left.weight``, ``right.values``."""
        found = dict(self.own_tensors())
        for name, child in self.children().items():
            found.update({f"{name}.{key}": value for key, value in child.tensors().items()})
        return found

    def with_tensors(self: Self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the same structure holding other tensors, without copying or looking at a value."""
        own = {name: tensors[name] for name in self.own_tensors()}
        children = {name: child.with_tensors(below(tensors, name)) for name, child in self.children().items()}
        try:
            return cast(Self, type(self).build(self.fields(), own, children))
        except KeyError as error:
            raise FormError(
                f"operator {self.kind!r}: build reads {error}, which its own_tensors, fields and children do not give; "
                "they have to hold all that build reads, by the same names"
            ) from error

    def config(self) -> dict[str, Any]:
        """Return the structure as JSON-able data; with `tensors` it is the whole operator."""
        config: dict[str, Any] = {"kind": self.kind, **self.fields()}
        children = self.children()
        if children:
            config["children"] = {name: child.config() for name, child in children.items()}
        return config

    @staticmethod
    def from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Operator:
        """Restore an operator from `config` and its tensors; nothing is evaluated or unpickled.

        Raises
        ------
        FormError
            If the kind is unknown, or a field or a tensor is missing or does not fit.
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("kind"), str):
            raise FormError(f"operator config: a dictionary with a 'kind' is needed, not {config!r}")
        kind = config["kind"]
        if kind not in Operator._kinds:
            # A kind that a form file brings is known once the form files are imported.
            importlib.import_module("recast.passes.forms.registry").discover()
        if kind not in Operator._kinds:
            raise FormError(f"operator config: unknown kind {kind!r}; {nearest(kind, Operator._kinds)}")
        described = config.get("children", {})
        if not isinstance(described, Mapping):
            raise FormError(f"operator config: 'children' of {kind!r} must be a dictionary, not {described!r}")
        children = {name: Operator.from_config(child, below(tensors, name)) for name, child in described.items()}
        own = {name: tensor for name, tensor in tensors.items() if "." not in name}
        fields = {name: value for name, value in config.items() if name not in ("kind", "children")}
        try:
            return Operator._kinds[kind].build(fields, own, children)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormError):
                raise
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise FormError(f"operator config: a {kind!r} operator cannot be restored: {reason}") from error

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors, storage shared between several of them counted once."""
        storages: dict[int, tuple[int, dict[tuple[Any, ...], int]]] = {}
        for tensor in self.tensors().values():
            storage = tensor.untyped_storage()
            _, views = storages.setdefault(storage._cdata, (storage.nbytes(), {}))
            key = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
            views[key] = tensor.numel() * tensor.element_size()
        # A view of a larger storage holds no more than what it shows.
        return sum(min(size, sum(views.values())) for size, views in storages.values())

    def map_leaves(self, f: Callable[[Dense, str], Operator]) -> Operator:
        """Replace each dense leaf by `f(leaf, path)`."""
        return self.refit(lambda leaf, path, _: f(leaf, path))

    def has_dense_leaves(self) -> bool:
        """Say whether `refit` would find anything to replace."""
        found: list[str] = []

        def note(leaf: Dense, path: str) -> Operator:
            found.append(path)
            return leaf

        self.map_leaves(note)
        return bool(found)

    def __repr__(self) -> str:
        parts = [f"{name}={child!r}" for name, child in self.children().items()]
        parts += [f"{name}={dtype_name(t.dtype)}{list(t.shape)}" for name, t in self.own_tensors().items()]
        return f"{type(self).__name__}({', '.join(parts)})"


def common_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one, of the same memory, shape and strides, as ``{name: the first such name}``."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for name, t in tensors.items():
        key = (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype)
        other = first.setdefault(key, name)
        if other != name:
            found[name] = other
    return found


def identity_of(operator: Operator) -> Hashable:
    """Equal for operators of one structure that hold the very same tensors: they compute the same."""
    children = tuple((name, identity_of(child)) for name, child in operator.children().items())
    own = tuple(
        (name, t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype)
        for name, t in operator.own_tensors().items()
    )
    return type(operator), repr(sorted(operator.fields().items())), own, children


def settled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors laid out in memory row by row from an aligned place on, as torch makes new ones; common ones stay common.

    Whether they come from a fit (views, transposed factors) or from a file then makes no difference: not to what is computed with
    them, in which layouts and alignments round differently, and not to how they are described.

    Examples
    --------
    >>> import torch
    >>> factor = torch.ones(3, 5).T
    >>> factor.stride(), settled({"left": factor})["left"].stride()
    ((1, 5), (3, 1))
    """
    common = common_tensors(tensors)
    made = {name: _settled(tensor) for name, tensor in tensors.items() if name not in common}
    return {name: made[common.get(name, name)] for name in tensors}


def _settled(tensor: Tensor) -> Tensor:
    # An axis of length one may have any stride in a contiguous tensor, so that asking for contiguity is not enough.
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").stride()
    if tensor.stride() == plain and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors whose dotted names begin with a name, without it."""
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def matmul_cost(shape: tuple[int, int], flops: int, weight_bytes: int, dtype: torch.dtype, tokens: int) -> Cost:
    """Cost of one product of `tokens` vectors: the weight is read once, the vectors are read and written."""
    return Cost(flops, weight_bytes + (shape[0] + shape[1]) * tokens * dtype.itemsize)


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Operator):
    """An ordinary matrix, `weight` (out_features, in_features)."""

    kind: ClassVar[str] = "dense"
    weight: Tensor

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"dense: a weight has two dimensions, this one has shape {tuple(self.weight.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))

    def to_dense(self) -> Tensor:
        return self.weight

    def cost(self, tokens: int) -> Cost:
        m, n = self.shape
        return matmul_cost(self.shape, 2 * m * n * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["weight"])

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.weight.to(dtype))

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        return fit(self, path, stats)


def holds(operator: Operator, kind: type[Operator]) -> bool:
    """Whether an operator is of a kind, or anything in it."""
    return isinstance(operator, kind) or any(holds(child, kind) for child in operator.children().values())


def stripped(operator: Operator, kind: type[Operator]) -> Operator:
    """Return the same operator with the `weight` of every operator of a kind in its place."""
    if isinstance(operator, kind):
        return stripped(operator.children()["weight"], kind)
    if not holds(operator, kind):
        return operator
    children = {name: stripped(child, kind) for name, child in operator.children().items()}
    return type(operator).build(operator.fields(), operator.own_tensors(), children)
