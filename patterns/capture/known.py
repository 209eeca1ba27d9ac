"""Values that are known while tracing, though tensors hold none: those computed from numbers alone.

``torch.div(size, 2, rounding_mode="trunc")`` and a row of ``torch.arange(experts)`` are tensors, and what a tensor holds is open
to the tracer. Beside each such tensor its value is kept, so that reading it gives the number itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["EveryExpert", "KnownValues"]

_LARGEST = 4096
_MADE = {torch.arange, torch.tensor, torch.as_tensor, torch.full, torch.zeros, torch.ones, torch.scalar_tensor}
_READ = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__"}
# Functions of values alone: what they give of known values is known.
_FOLLOWED = {
    *("__getitem__", "select", "squeeze", "unsqueeze", "view", "reshape", "flatten", "unbind", "to", "long", "int"),
    *("max", "min", "sum", "any", "all", "add", "sub", "mul", "div", "floor_divide", "remainder"),
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "neg"),
}
_FOLLOWED |= {f"__{name}__" for name in _FOLLOWED}
_SIZED = {
    "view",
    "reshape",
    "expand",
    "repeat",
    "narrow",
    "select",
    "split",
    "chunk",
    "new_zeros",
    "new_ones",
    "new_full",
}
_SIZED |= {"zeros", "ones", "full", "empty", "new_empty", "arange", "as_strided", "unflatten", "__getitem__"}
_WRITES = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")),
}


class KnownValues(TorchFunctionMode):
    """Keeps the values of tensors that are made of numbers, and gives them where they are read or taken for a size."""

    def __init__(self) -> None:
        super().__init__()
        # By id: the tensor, which is held so that ids stay, and its value, a tensor or a symbolic number.
        self.known: dict[int, tuple[Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.div and (value := _quotient(args, kwargs)) is not None:
            return self.keep(func(*args, **kwargs), value)
        if func in _MADE and _of_numbers((args, kwargs)):
            return self._also(func, func(*args, **kwargs), args, {**kwargs, "device": "cpu"})
        if not self.known:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", ""))
        if (name.endswith("_") and not name.endswith("__")) or name in _WRITES or "out" in kwargs:
            self._forget(kwargs.get("out", args[0] if args else None))
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        known = [self.value(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(value is not None for value in known):
            return func(*args, **kwargs)
        if all(value is not None for value in known):
            if name in _READ:
                return _read(name, known[0], args[1:])
            if name == "__iter__":
                rows = args[0].unbind(0)
                return iter([self.keep(row, value) for row, value in zip(rows, known[0], strict=True)])
            open_ones = torch.SymInt | torch.SymFloat | torch.SymBool
            if name in _FOLLOWED and not any(isinstance(value, open_ones) for value in [*known, *leaves]):
                values = pytree.tree_map(
                    lambda leaf: self.value(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
                )
                return self._also(func, func(*args, **kwargs), *values)
        if name in _SIZED:  # the first is what is viewed, not a size
            first, rest = args[:1], args[1:]
            rest, kwargs = pytree.tree_map(self._number, (rest, kwargs))
            args = (*(first if isinstance(args[0], Tensor) else pytree.tree_map(self._number, first)), *rest)
        return func(*args, **kwargs)

    def keep(self, tensor: Any, value: Any) -> Any:
        """Note what a tensor holds."""
        self.known[id(tensor)] = (tensor, value)
        return tensor

    def _forget(self, written: Any) -> None:
        """Forget what may share memory with a tensor that is written to."""
        dtypes = {leaf.dtype for leaf in pytree.tree_leaves(written) if isinstance(leaf, Tensor)}
        self.known = {i: held for i, held in self.known.items() if held[0].dtype not in dtypes}

    def value(self, tensor: Any) -> Any:
        """What a tensor holds, a tensor or a symbolic number, or None."""
        held = self.known.get(id(tensor))
        return held[1] if held is not None and held[0] is tensor else None

    def _number(self, leaf: Any) -> Any:
        """The number that stands for a known tensor of no dimensions."""
        value = self.value(leaf) if isinstance(leaf, Tensor) else None
        if isinstance(value, Tensor):
            whole = value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
            return int(value) if whole else leaf
        return leaf if value is None else value

    def _also(self, func: Callable[..., Any], result: Any, args: Any, kwargs: Any) -> Any:
        """Compute the same on the values."""
        with _disable_current_modes(), torch.no_grad():
            try:
                value = func(*args, **kwargs)
            except Exception:  # noqa: BLE001  # not known then
                return result
        made, values = pytree.tree_leaves(result), pytree.tree_leaves(value)
        for one, other in zip(made, values, strict=False):
            if isinstance(one, Tensor) and isinstance(other, Tensor) and other.numel() <= _LARGEST:
                self.keep(one, other)
        return result


def _of_numbers(tree: Any) -> bool:
    """Whether these are plain numbers, of which a value can be computed."""
    plain = int | float | bool | str | None | torch.dtype | torch.device | torch.layout
    return all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(tree))


def _quotient(args: Any, kwargs: Any) -> Any:
    """What `torch.div` of two sizes holds."""
    if len(args) != 2 or kwargs.get("rounding_mode") not in ("trunc", "floor"):
        return None
    whole = all(isinstance(a, int | torch.SymInt) and not isinstance(a, bool) for a in args)
    return args[0] // args[1] if whole and args[0] >= 0 and args[1] > 0 else None


def _read(name: str, value: Any, more: Any) -> Any:
    if name == "__format__":
        return format(value.item() if isinstance(value, Tensor) and value.ndim == 0 else value, *more)
    if not isinstance(value, Tensor):
        return bool(value) if name == "__bool__" else value
    read: dict[str, Callable[[Tensor], Any]] = {
        "__bool__": bool,
        "__int__": int,
        "__float__": float,
        "__index__": int,
        "tolist": Tensor.tolist,
    }
    with _disable_current_modes():
        return read.get(name, Tensor.item)(value)


class EveryExpert(KnownValues):
    """``nonzero`` of a short column of truth values, one for each expert, gives all rows."""

    def __init__(self, model: nn.Module, said: list[str]) -> None:
        super().__init__()
        self.counts = {n for m in model.modules() if isinstance(n := getattr(m, "num_experts", None), int)}
        self.said = said

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.nonzero, torch.nonzero) and not kwargs.get("as_tuple", False) and _is_column(args[0]):
            self.said[:] = [
                "captured with every expert visited: a loop over the experts that were hit cannot be traced"
            ]
            count = args[0].shape[0]
            # A row more than there are experts stands for tokens sent nowhere: never visited.
            count = count - 1 if count - 1 in self.counts and count not in self.counts else count
            with _disable_current_modes():
                value = _rows(count, args[0].ndim)
            return self.keep(_rows(count, args[0].ndim).to(args[0].device), value)
        if func is Tensor.numel and not isinstance(count := func(*args), int) and free_unbacked_symbols(count):
            return torch.sym_max(
                count, 1
            )  # `if tokens.numel() == 0: continue` saves work only: nothing is added for none
        return super().__torch_function__(func, types, args, kwargs)


def _rows(count: int, width: int) -> Tensor:
    rows = torch.arange(count)
    return torch.stack([rows, *[torch.zeros_like(rows)] * (width - 1)], 1)


def _is_column(value: Tensor) -> bool:
    """Whether these are truth values of a number known to tracing, in one dimension: of experts, not of tokens."""
    sizes = value.shape
    fixed = all(isinstance(size, int) for size in sizes)
    return value.dtype == torch.bool and fixed and value.ndim > 0 and sizes.numel() == sizes[0] and 1 < sizes[0] <= 1024
