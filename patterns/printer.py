"""Programs as stable, readable text: one line a value, weights by name and shape."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from recast.patterns.program import Program

__all__ = ["program_text", "type_text"]

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


class _Symbols:
    """Give symbolic sizes short names in order of appearance, so that text does not depend on tracing details."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def text(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        return re.sub(r"\b([su])\d+\b", self._name, str(size))

    def _name(self, match: re.Match[str]) -> str:
        return self.names.setdefault(match.group(0), f"{match.group(1)}{len(self.names)}")


def type_text(value: Any, symbols: _Symbols | None = None) -> str:
    """Short type of a value: ``f32[s0, 384]``; tuples in parentheses.

    Examples
    --------
    >>> import torch
    >>> type_text(torch.zeros(2, 3))
    'f32[2, 3]'
    """
    symbols = symbols or _Symbols()
    if isinstance(value, Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(symbols.text(s) for s in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(v, symbols) for v in value)})"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return symbols.text(value.node.expr)
    return "none" if value is None else repr(value)


def program_text(program: Program) -> str:
    """Text of a program; see `Program`."""
    symbols = _Symbols()
    inputs = ", ".join(f"{n.name}: {type_text(n.meta.get('val'), symbols)}" for n in program.inputs())
    lines = [f"program {program.label}({inputs})"]
    for node in program.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method"):
            lines.append(f"  {node.name}: {type_text(node.meta.get('val'), symbols)} = {_call(node, program, symbols)}")
        elif node.op == "output":
            mutated = {i: name for i, _, name in program.interface.mutations}
            results = [_arg(a, program, symbols) for a in node.args[0]]
            for i, name in mutated.items():
                lines.append(f"  {name} <- {results[i]}")
            lines.append(f"  return {', '.join(r for i, r in enumerate(results) if i not in mutated)}")
    return "\n".join(lines) + "\n"


def _call(node: fx.Node, program: Program, symbols: _Symbols) -> str:
    arguments = [_arg(a, program, symbols) for a in node.args]
    arguments += [f"{k}={_arg(v, program, symbols)}" for k, v in node.kwargs.items()]
    if node.op == "call_module":
        module = program.module.get_submodule(str(node.target))
        return f"{module}({', '.join(arguments)})"
    return f"{target_text(node.target)}({', '.join(arguments)})"


def target_text(target: Any) -> str:
    """Name of an operation, without namespace and overload where they say nothing."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.")
        return name.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _arg(value: Any, program: Program, symbols: _Symbols) -> str:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            tensor = program.module
            for part in str(value.target).split("."):
                tensor = getattr(tensor, part)
            return f"{value.target}: {type_text(tensor, symbols)}" if isinstance(tensor, Tensor) else str(value.target)
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(_arg(v, program, symbols) for v in value)}]"
    if isinstance(value, torch.dtype):
        return _SHORT.get(value, str(value).removeprefix("torch."))
    return repr(value) if isinstance(value, str) else str(value)
