"""Arithmetic, comparisons and functions of single values."""

from __future__ import annotations

import functools
import math
import operator as python
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recast.patterns.capture.onnx.graph import DTYPES
from recast.patterns.capture.onnx.operator import Call, operator, same_rank
from recast.patterns.capture.onnx.values import Known, Left, Value, largest, smallest, tensor_of

Numbers = Callable[..., Any]


def _pair(call: Call) -> tuple[Any, Any]:
    """Two operands of which one is a tensor; the other may be a number."""
    left, right = call[0], call[1]
    return same_rank(left, right), same_rank(right, left)


def _binary(*types: str, on: Numbers, numbers: Numbers | None = None, dtype: torch.dtype | None = None) -> None:
    @operator(*types)
    def run(call: Call) -> Value:
        left, right = call[0], call[1]
        if isinstance(left, Known) and isinstance(right, Known):
            return left.map(numbers or on, right, dtype=dtype)
        result: Tensor = on(*_pair(call))
        return result


def _truncated(a: Any, b: Any) -> Any:
    """Division of whole numbers, towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # of sizes, which are not negative


def _divided(a: Any, b: Any) -> Any:
    whole = not any(t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, float) for t in (a, b))
    if not whole:
        return a / b
    if not isinstance(a, Tensor):
        a = torch.full_like(b, a)
    return torch.div(a, b, rounding_mode="trunc")


def _known_division(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, float) or isinstance(b, float) else _truncated(a, b)


_binary("Add", on=python.add)
_binary("Sub", on=python.sub)
_binary("Mul", on=python.mul)
_binary("Div", on=_divided, numbers=_known_division)
_binary("Equal", on=python.eq, dtype=torch.bool)
_binary("Greater", on=python.gt, dtype=torch.bool)
_binary("Less", on=python.lt, dtype=torch.bool)
_binary("GreaterOrEqual", on=python.ge, dtype=torch.bool)
_binary("LessOrEqual", on=python.le, dtype=torch.bool)


def _logical(name: str, on: Callable[[Tensor, Tensor], Tensor], numbers: Numbers) -> None:
    @operator(name)
    def run(call: Call) -> Value:
        left, right = call[0], call[1]
        if isinstance(left, Known) and isinstance(right, Known):
            return left.map(numbers, right)
        return on(tensor_of(left), tensor_of(right))


_logical("And", torch.bitwise_and, lambda a, b: bool(a) and bool(b))
_logical("Or", torch.bitwise_or, lambda a, b: bool(a) or bool(b))
_logical("Xor", torch.bitwise_xor, lambda a, b: bool(a) != bool(b))
_logical("BitwiseAnd", torch.bitwise_and, python.and_)
_logical("BitwiseOr", torch.bitwise_or, python.or_)
_logical("BitwiseXor", torch.bitwise_xor, python.xor)


@operator("Pow")
def power(call: Call) -> Value:
    """``x ** y`` in the dtype of x."""
    base, exponent = call[0], call[1]
    if isinstance(base, Known) and isinstance(exponent, Known):
        return base.map(python.pow, exponent)
    if isinstance(base, Known):
        return torch.pow(base.tensor(), tensor_of(exponent))
    result = torch.pow(base, same_rank(exponent, base))
    return result if result.dtype == base.dtype else result.to(base.dtype)


@operator("Mod")
def modulo(call: Call) -> Value:
    """Remainder with the divisor's sign, or as C has it (fmod)."""
    as_c = call.attribute("fmod", 0)
    left, right = call[0], call[1]
    if isinstance(left, Known) and isinstance(right, Known):
        return left.map(math.fmod if as_c else python.mod, right)
    return (torch.fmod if as_c else torch.remainder)(tensor_of(left), tensor_of(right))


def _of_many(name: str, on: Callable[[Tensor, Tensor], Tensor], numbers: Numbers) -> None:
    @operator(name)
    def run(call: Call) -> Value:
        values = [value for value in call.inputs if value is not None]
        if all(isinstance(value, Known) for value in values):
            return functools.reduce(lambda a, b: a.map(numbers, b), values)  # type: ignore[union-attr,arg-type]
        return functools.reduce(on, [tensor_of(value) for value in values])


_of_many("Max", torch.maximum, largest)
_of_many("Min", torch.minimum, smallest)
_of_many("Sum", torch.add, python.add)


@operator("Mean")
def mean(call: Call) -> Value:
    """Mean of several tensors."""
    return functools.reduce(torch.add, [tensor_of(value) for value in call.inputs if value is not None]) / len(
        call.inputs
    )


def _unary(name: str, on: Callable[[Tensor], Tensor], numbers: Numbers | None = None) -> None:
    @operator(name)
    def run(call: Call) -> Value:
        value = call[0]
        if isinstance(value, Known) and numbers is not None:
            return value.map(numbers)
        return on(tensor_of(value))


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "Exp": torch.exp,
    "Log": torch.log,
    "Reciprocal": torch.reciprocal,
    "Erf": torch.erf,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Round": torch.round,
    "Sign": torch.sign,
    "IsNaN": torch.isnan,
    "BitwiseNot": torch.bitwise_not,
}
for _name, _on in _PLAIN.items():
    _unary(_name, _on)
_unary("Neg", torch.neg, python.neg)
_unary("Abs", torch.abs, abs)
_unary("Not", torch.logical_not, python.not_)
_unary("Floor", torch.floor, lambda n: float(math.floor(n)) if isinstance(n, float) else n)
_unary("Ceil", torch.ceil, lambda n: float(math.ceil(n)) if isinstance(n, float) else n)


@operator("Sqrt")
def square_root(call: Call) -> Value:
    """Of sizes, too: heads are scaled by the root of their width."""
    value = call[0]
    if isinstance(value, Known) and all(isinstance(n, float) for n in value.list()):
        return value.map(math.sqrt)
    return torch.sqrt(tensor_of(value))


@operator("IsInf")
def is_infinite(call: Call) -> Value:
    """Of both signs."""
    call.refuse(detect_negative=1, detect_positive=1)
    return torch.isinf(call.tensor(0))


@operator("Where")
def where(call: Call) -> Value:
    """``x`` where the condition holds, else ``y``."""
    condition, x, y = call[0], call[1], call[2]
    if isinstance(condition, Known) and isinstance(x, Known) and isinstance(y, Known):
        return condition.map(lambda c, a, b: a if c else b, x, y, dtype=x.dtype)
    chosen = tensor_of(condition)
    if isinstance(x, Known) and isinstance(y, Known):
        numbers = x.values.size == y.values.size == 1 and max(x.values.ndim, y.values.ndim) <= chosen.ndim
        if numbers and x.dtype in (torch.float32, torch.int64):  # what torch makes of two numbers
            return torch.where(chosen, x.number, y.number)
        return torch.where(chosen, x.tensor(), y.tensor())
    return torch.where(chosen, same_rank(x, y), same_rank(y, x))


@operator("Clip")
def clip(call: Call) -> Value:
    """Bounds as attributes (old) or inputs."""
    value = call[0]
    bounds: list[Any] = [call.attribute("min"), call.attribute("max")]
    for i, position in enumerate((1, 2)):
        if (given := call.optional(position)) is not None:
            bounds[i] = same_rank(given, value) if isinstance(value, Tensor) else given
    if isinstance(value, Known):
        lowest, highest = (b.number if isinstance(b, Known) else b for b in bounds)
        value = value if lowest is None else value.map(lambda n: largest(n, lowest))
        return value if highest is None else value.map(lambda n: smallest(n, highest))
    if bounds == [None, None]:
        return value
    return torch.clamp(value, *bounds)


@operator("Cast")
def cast(call: Call) -> Value:
    """To the dtype of that number."""
    return _cast(call[0], DTYPES.get(call.attribute("to")))


@operator("CastLike")
def cast_like(call: Call) -> Value:
    """To the dtype of the second input."""
    return _cast(call[0], call[1].dtype)


def _cast(value: Value, dtype: torch.dtype | None) -> Value:
    if dtype is None:
        raise Left("to a type that torch has not")
    if not isinstance(value, Known):
        return value.to(dtype)
    if dtype.is_floating_point:
        if dtype not in (torch.float32, torch.float64) or any(isinstance(n, torch.SymBool) for n in value.list()):
            return value.tensor().to(dtype)
        return value.map(torch.sym_float, dtype=dtype)
    if dtype == torch.bool:
        return value.map(lambda n: n if isinstance(n, torch.SymBool) else n != 0, dtype=dtype)
    return value.map(lambda n: n if isinstance(n, torch.SymInt) else _whole(n), dtype=dtype)


def _whole(number: Any) -> Any:
    return torch.sym_int(number)  # type: ignore[no-untyped-call]


@operator("Identity")
def identity(call: Call) -> Value:
    """The same."""
    return call[0]


@operator("Dropout")
def dropout(call: Call) -> Value:
    """Nothing is dropped but in training."""
    call.alone()
    if (training := call.optional(2)) is not None and (not isinstance(training, Known) or training.number):
        raise Left("in training mode")
    return call[0]
