"""Handing programs to Inductor: whole ones, and graphs that came from `torch.compile`."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recast.lowering.inductor.attention import with_own_attention
from recast.lowering.inductor.kernels import INTEGER
from recast.lowering.inductor.rounded import joined
from recast.lowering.inline import Choose, inline_operators
from recast.lowering.neighbours import fuse_neighbours
from recast.patterns.program import Program, with_code

__all__ = ["compile_graph", "compile_program", "inlined"]


def _import_inductor() -> None:
    """Import what Inductor imports on first use: under ``-W error`` torch's own deprecations would end the compilation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.compile_fx
        import torch.utils.mkldnn  # noqa: F401


class _Flat(nn.Module):
    """A program's graph as a module that dynamo can trace."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.graph_module = with_code(program.module)

    def forward(self, *leaves: Any) -> Any:
        return self.graph_module(*leaves)


def _own_code(program: Program) -> nn.Module:
    """The module with code of its own: dynamo counts recompilations by code, and programs are no recompilations of each other."""
    code = _Flat.forward.__code__.replace(co_name="forward")
    forward = types.FunctionType(code, _Flat.forward.__globals__, "forward")
    kind: type[_Flat] = type("_Flat", (_Flat,), {"forward": forward})
    return kind(program).eval()


def _settings(kernels: Mapping[str, str], freezing: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options for a program; those that were given win."""
    settings: dict[str, Any] = {"freezing": True} if freezing else {}
    if any(INTEGER in kernel for kernel in kernels.values()):
        # What is rounded is read twice, for its range and for its codes. By default Inductor computes it twice: for
        # MiniLM's GELU that took twice the time of keeping it.
        settings["realize_opcount_threshold"] = 6
    return {**settings, **options}


def inlined(
    program: Program, choose: Choose, paired: Mapping[Any, Mapping[str, int]] | None = None
) -> tuple[Program, dict[str, str]]:
    """The program without operator nodes, neighbours of products within their operations, and the kernel of each site."""
    flat, kernels = inline_operators(program, choose)
    kernels = fuse_neighbours(flat, kernels, paired or {})
    joined(flat)
    return flat, kernels


def compile_program(
    program: Program, kernels: Mapping[str, str], *, freezing: bool, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a program without operator nodes: for the first shapes as they are, from the second on for any that capture left free."""
    _import_inductor()
    program = with_own_attention(program)
    settings = _settings(kernels, freezing, options)
    compiled: Callable[..., Any] = torch.compile(_own_code(program), fullgraph=True, dynamic=None, options=settings)
    return compiled


def compile_graph(
    program: Program, inputs: Sequence[Any], choose: Choose, *, freezing: bool, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, str]]:
    """Compile a rewritten dynamo graph; its weights are lifted to inputs, so that Inductor's caches stay valid.

    Returns
    -------
    callable, kernels
        Takes the graph's remaining inputs; and the kernel of each site.
    """
    _import_inductor()
    from torch._inductor.compile_fx import compile_fx

    flat, kernels = inlined(program, choose)
    flat = with_own_attention(flat)
    settings = _settings(kernels, freezing, options)
    compiled: Any = compile_fx(flat.module, list(inputs), config_patches=settings or None)
    return compiled, kernels
