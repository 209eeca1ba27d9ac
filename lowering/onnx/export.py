"""A program without operator nodes as an ONNX model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from recast.lowering.onnx.cache import cache_inputs, present_names
from recast.lowering.onnx.decomposed import Decomposed
from recast.lowering.onnx.session import needed
from recast.lowering.onnx.translations import translations
from recast.patterns.errors import TargetError
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import Program

__all__ = ["check", "export", "input_names", "output_kinds"]

_FREE = ("batch", "sequence")
_WORTH_SHARING = 256  # bytes


class _Flat(nn.Module):
    """A program's graph over its tensor inputs alone; the others are the constants it was captured with."""

    def __init__(self, program: Program, positions: list[int], results: list[int]) -> None:
        super().__init__()
        self.program = program.module
        self.positions, self.results = positions, results
        self.sizes = _same_sizes([program.inputs()[i].meta["val"] for i in positions])
        self.constants = [program.interface.constants.get(i) for i in range(len(program.inputs()))]

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        for (first, a), (other, b) in self.sizes:
            torch._check(tensors[first].shape[a] == tensors[other].shape[b])  # type: ignore[no-untyped-call]
        leaves = list(self.constants)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        found = self.program(*leaves)
        return tuple(found[i] for i in self.results)


def _same_sizes(values: list[Tensor]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (input, dimension) that the program holds for one free size."""
    first: dict[str, tuple[int, int]] = {}
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for place, value in enumerate(values):
        for dimension, size in enumerate(value.shape):
            here = (place, dimension)
            if not isinstance(size, int) and first.setdefault(str(size), here) != here:
                found.append((first[str(size)], here))
    return found


def input_names(program: Program) -> list[str | None]:
    """Name of each flat input, None where it is no tensor."""
    nodes = program.inputs()
    plain = [str(n.target) if isinstance(n.meta.get("val"), Tensor) else None for n in nodes]
    return plain if program.decoder is None else cache_inputs(plain)


def output_kinds(program: Program) -> list[list[Any]]:
    """What each flat result is: a tensor or an integer of the graph, with its name, or a constant."""
    (output,) = program.graph.find_nodes(op="output")
    results = list(output.args[0])
    names = _result_names(program, len(results))
    kinds: list[list[Any]] = []
    for name, result in zip(names, results, strict=True):
        if not isinstance(result, fx.Node):
            kinds.append(["constant", result])
        else:
            kinds.append(["tensor" if isinstance(result.meta.get("val"), Tensor) else "int", name])
    return kinds


def _result_names(program: Program, count: int) -> list[str]:
    example = pytree.tree_unflatten(list(range(count)), program.interface.out_spec)
    taken: set[str] = {name for name in input_names(program) if name}
    names: list[str] = []
    if program.decoder is not None:
        return ["logits", *present_names(len(program.decoder["cache"]))]
    for path, position in pytree.tree_flatten_with_path(example)[0]:
        text = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_")
        name = text if re.match(r"[A-Za-z_]", text) else f"output_{text or position}" if count > 1 else "output"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def export(program: Program, sites: Mapping[str, str], opset: int) -> Any:
    """Export a program.

    Parameters
    ----------
    program
        Without operator nodes.
    sites
        Site of each path under which tensors of operators are held: initializers are named after sites.
    opset
        Version of the standard operators.

    Returns
    -------
    onnx_ir.Model
        Nothing in it names this machine, and the same program gives the same model.

    Raises
    ------
    TargetError
        Something has no ONNX operator.
    """
    needed("onnx")
    needed("onnxscript")
    names, kinds = input_names(program), output_kinds(program)
    positions = [i for i, name in enumerate(names) if name is not None]
    nodes = [program.inputs()[i] for i in positions]
    free = [
        {d: torch.export.Dim.AUTO for d, s in enumerate(n.meta["val"].shape) if not isinstance(s, int)} for n in nodes
    ]
    results = [i for i, (kind, _) in enumerate(kinds) if kind != "constant"]
    flat = _Flat(program, positions, results).eval()
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                flat, tuple(_example(n.meta["val"]) for n in nodes), dynamic_shapes=(tuple(free),), strict=False
            )

            def translate(exported: torch.export.ExportedProgram) -> Any:
                return torch.onnx.export(
                    exported,
                    dynamo=True,
                    opset_version=opset,
                    verbose=False,
                    input_names=[str(names[i]) for i in positions],
                    output_names=[str(kinds[i][1]) for i in results],
                    custom_translation_table=translations(),
                )

            try:
                made = translate(Decomposed.of(exported))
            except torch.onnx.OnnxExporterError:  # an operation that has to be decomposed, after all
                made = translate(exported)
    except Exception as error:  # torch raises many classes here; all mean the same
        raise TargetError(f"target 'onnx': {program.label} cannot be exported: {_reason(error)}") from error
    assert made is not None
    model = made.model
    _tidy(model, sites)
    _share(model)
    return model


def check(program: Program) -> None:
    """Raise TargetError for what an ONNX graph, or ONNX Runtime on the CPU, cannot do."""
    if program.interface.mutations:
        _, kind, name = program.interface.mutations[0]
        raise TargetError(
            f"target 'onnx': {program.label} changes its {kind} '{name}' as it runs, and an ONNX graph changes "
            "nothing; return the new value from forward, or use target 'inductor'"
        )
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            raise TargetError(
                f"target 'onnx': '{node.name}' is bfloat16, for which ONNX Runtime has no kernels on the CPU; "
                "compute in float32 (model.float(), or compute_dtype: float32), or use target 'inductor'"
            )


def _example(value: Tensor) -> Tensor:
    return torch.zeros([size_hint(s) for s in value.shape], dtype=value.dtype)


def _reason(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def _tidy(model: Any, sites: Mapping[str, str]) -> None:
    """Take out traces of where the export ran, and give sizes and weights names that mean something."""
    sizes: dict[str, str] = {}
    for value in model.graph.inputs:
        for dimension, size in enumerate(value.shape):
            text = str(getattr(size, "value", size))
            if re.fullmatch(r"s\d+", text) and text not in sizes:
                plain = _FREE[dimension] if dimension < len(_FREE) else f"size_{dimension}"
                plain = "past" if value.name.startswith("past_key_values.") else plain
                same = sum(1 for name in sizes.values() if name.rstrip("_0123456789") == plain)
                sizes[text] = plain if not same else f"{plain}_{same + 1}"
    import onnx_ir

    prefixes = sorted(((f"program.{path}.", f"{site}.") for path, site in sites.items()), reverse=True)
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is not None:
            renamed = [
                size
                if isinstance(size, int)
                else re.sub(r"s\d+", lambda found: sizes.get(found[0], found[0]), str(size.value))
                for size in value.shape
            ]
            value.shape = onnx_ir.Shape([s if isinstance(s, int) or s != "None" else None for s in renamed])
    for name, value in list(model.graph.initializers.items()):
        found = next((site + name[len(path) :] for path, site in prefixes if name.startswith(path)), None)
        plain = found or name.removeprefix("program.")
        if plain != name and plain not in model.graph.initializers:
            value.name = plain


def _share(model: Any) -> None:
    """Keep initializers of equal values once: what several sites hold in common was laid out for each of them."""
    import onnx_ir

    first: dict[tuple[Any, ...], Any] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _WORTH_SHARING or value.is_graph_output():
            continue
        digest = hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
        other = first.setdefault((tensor.dtype, tuple(tensor.shape), digest), value)
        if other is not value:
            onnx_ir.convenience.replace_all_uses_with(value, other)
            del model.graph.initializers[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters log and deprecate to themselves; errors come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
