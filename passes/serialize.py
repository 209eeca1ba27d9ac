"""Programs as JSON and tensors: nothing is pickled, and nothing in a file is run but operations named by it."""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from recast.passes.dialect import inline_dialect
from recast.passes.forms.operator import ALIGNMENT, Operator, common_tensors
from recast.passes.meta import propagate
from recast.passes.module import OperatorModule
from recast.passes.spec import decode_spec, encode_spec
from recast.patterns.derivation import Derivation
from recast.patterns.errors import ArtifactError, RecastError
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import Interface, Program, fixed_size, get_by_path, graph_module, set_by_path

__all__ = ["program_from", "program_to"]

_NAMED: dict[str, dict[str, Any]] = {
    "dtype": {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "layout": {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)},
    "memory_format": {str(v): v for v in vars(torch).values() if isinstance(v, torch.memory_format)},
}
# Arithmetic on sizes. Modules are not opened as a whole: `operator` alone can fetch any attribute and call it.
_ARITHMETIC = frozenset(
    {
        "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "index", "invert", "le", "lshift", "lt", "mod",
        "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor",
    }
)  # fmt: skip
_MATHEMATICS = frozenset({"ceil", "floor", "isqrt", "log", "log2", "sqrt", "trunc"})
# Operations that touch files or run foreign code, whoever names them.
_FORBIDDEN = re.compile(
    r"^torch\.ops\.(aten\.(from_file|save|load)|profiler|mkldnn_prepacked|prepacked|c10d|_c10d|rpc)"
)
_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\\\]+")  # names go into the text of generated code


def program_to(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe a program: JSON-able structure, and tensors by name. Operations of the dialect are traced away before."""
    program = inline_dialect(program)
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    operators: dict[str, Any] = {}
    held: dict[str, Tensor] = {}  # of operators

    def keep(name: str, tensor: Tensor) -> None:
        tensors[name] = tensor
        layouts[name] = {"stride": list(tensor.stride()), "offset": tensor.data_ptr() % ALIGNMENT}

    nodes = []
    for node in program.graph.nodes:
        row: dict[str, Any] = {"op": node.op, "name": node.name, "target": _target_text(node)}
        if node.op == "get_attr":
            value = get_by_path(program.module, node.target)
            if not isinstance(value, Tensor):
                raise ArtifactError(
                    f"artifact: '{node.target}' is a {type(value).__name__}; a graph with inner graphs cannot be saved"
                )
            keep(node.target, value.detach())
        elif node.op == "call_module":
            module = program.module.get_submodule(node.target)
            if not isinstance(module, OperatorModule):
                raise ArtifactError(f"artifact: '{node.target}' is a {type(module).__name__}, which cannot be saved")
            operators[node.target] = {"config": module.structure.config(), "site": module.site, "form": module.form}
            for name, tensor in module.operator.tensors().items():
                held[f"{node.target}/{name}"] = tensor.detach()
            if module.order is not None:
                tensors[f"{node.target}//order"] = module.order
        if node.op != "get_attr":
            row["args"], row["kwargs"] = _encode(node.args), _encode(dict(node.kwargs))
        if node.op == "placeholder":
            row["value"] = _describe(node.meta.get("val"))
        nodes.append(row)
    # What operators hold in common is kept once.
    common = common_tensors(held)
    for name, tensor in held.items():
        if name not in common:
            keep(name, tensor)
    interface = program.interface
    data = {
        "nodes": nodes,
        "operators": operators,
        "common": common,
        "layouts": layouts,
        "aliases": program.aliases,
        "door": program.door,
        "training": program.training,
        "label": program.label,
        "notes": program.notes,
        "decoder": program.decoder,
        "derived": {name: made.to_dict() for name, made in program.derived.items()},
        "dropped": program.dropped,
        "interface": {
            "parameters": list(interface.parameters),
            "args": list(interface.args),
            "kwargs": list(interface.kwargs),
            "in_spec": encode_spec(interface.in_spec),
            "out_spec": encode_spec(interface.out_spec),
            "constants": {str(k): _encode(v) for k, v in interface.constants.items()},
            "mutations": [list(m) for m in interface.mutations],
        },
    }
    return data, _independent(tensors)


def _independent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    return {name: t.cpu().contiguous() if _alone(t, name, tensors) else t.cpu().clone() for name, t in tensors.items()}


def _alone(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> bool:
    own = tensor.untyped_storage().data_ptr()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return whole and not any(other.untyped_storage().data_ptr() == own for n, other in tensors.items() if n != name)


def _target_text(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return {
        "dtype": str(value.dtype),
        "shape": [_size(s) for s in value.shape],
        "example": [size_hint(s) for s in value.shape],
    }


def _size(size: Any) -> int | str:
    fixed = fixed_size(size)
    return str(size.node.expr) if fixed is None else fixed


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, table in _NAMED.items():
        if str(value) in table and table[str(value)] is value:
            return {kind: str(value)}
    raise ArtifactError(f"artifact: an argument of type {type(value).__name__} ({value!r}) cannot be saved")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(v, nodes) for v in content)
    if kind == "dict":
        return {k: _decode(v, nodes) for k, v in content}
    if kind == "slice":
        return slice(*(_decode(v, nodes) for v in content))
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    return _NAMED[kind][content]


def _target(text: str) -> Callable[..., Any]:
    """Operation of a name: an overload under ``torch.ops``, or plain arithmetic on sizes; nothing else can be named."""
    namespace, _, rest = text.partition(".")
    if text.startswith("torch.ops.") and not _FORBIDDEN.match(text):
        if text.startswith("torch.ops.recast.onnx_node"):
            importlib.import_module("recast.patterns.capture.onnx.kept")  # which defines it
        found: Any = torch.ops
        for part in text.removeprefix("torch.ops.").split("."):
            found = getattr(found, part, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
        raise ArtifactError(
            f"artifact: operation '{text}' is not known to torch {torch.__version__}; import the package that "
            "defines it"
        )
    if namespace in ("_operator", "operator") and rest in _ARITHMETIC:
        return getattr(operator, rest)  # type: ignore[no-any-return]
    if namespace == "math" and rest in _MATHEMATICS:
        return getattr(math, rest)  # type: ignore[no-any-return]
    if namespace == "torch" and rest.startswith("sym_") and callable(getattr(torch, rest, None)):
        return getattr(torch, rest)  # type: ignore[no-any-return]
    raise ArtifactError(f"artifact: operation '{text}' may not be named in an artifact")


def _path(text: Any) -> str:
    """Dotted name of a weight or module, harmless as text."""
    if not isinstance(text, str) or not all(_PATH.fullmatch(part) for part in text.split(".")):
        raise ArtifactError(f"artifact: {text!r} is no name of a weight or an operator")
    return text


def _identifier(text: Any) -> str:
    if not isinstance(text, str) or not text.isidentifier():
        raise ArtifactError(f"artifact: {text!r} is no name of a value or an argument")
    return text


def program_from(data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """Program that `program_to` described.

    Raises
    ------
    ArtifactError
        Something is missing, or names what may not be named.
    """
    try:
        return _program_from(data, tensors)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecastError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"artifact: the description of the program is damaged ({type(error).__name__}: {error}); save it again"
        ) from error


def _program_from(data: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    root, graph = nn.Module(), fx.Graph()
    nodes: dict[str, fx.Node] = {}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols: dict[str, Any] = {}
    laid_out = {
        n: _laid_out(t, data["layouts"][n]) for n, t in tensors.items() if "/" in n and "//" not in n
    }  # those of operators
    for name, other in data.get("common", {}).items():
        laid_out[name] = laid_out[other]
    for path, row in data["operators"].items():
        own = {n.removeprefix(f"{path}/"): t for n, t in laid_out.items() if n.startswith(f"{path}/")}
        operator_ = Operator.from_config(row["config"], own)
        set_by_path(
            root, _path(path), OperatorModule(operator_, row["site"], row["form"], tensors.get(f"{path}//order"))
        )
    for row in data["nodes"]:
        name, op = _identifier(row["name"]), row["op"]
        if op == "get_attr":
            target = _path(row["target"])
            set_by_path(root, target, _laid_out(tensors[target], data["layouts"][target]))
            node = graph.create_node("get_attr", target, (), {}, name=name)
        else:
            args, kwargs = _decode(row["args"], nodes), _decode(row["kwargs"], nodes)
            if op not in ("call_function", "placeholder", "output", "call_module"):
                raise ArtifactError(f"artifact: node '{name}' is a {op}, which may not be in an artifact")
            called: Any = row["target"]
            called = _target(called) if op == "call_function" else _path(called)
            if op in ("placeholder", "output"):
                _identifier(called)
            if op == "call_module" and called not in data["operators"]:
                raise ArtifactError(f"artifact: node '{name}' calls '{called}', which is no operator")
            kwargs = {_identifier(k): v for k, v in kwargs.items()}
            node = graph.create_node(op, called, args, kwargs, name=name)
            if op == "placeholder":
                node.meta["val"] = _placeholder(row["value"], mode, symbols)
        nodes[name] = node
    described = data["interface"]
    program = Program(
        module=graph_module(root, graph),
        interface=Interface(
            parameters=tuple(described["parameters"]),
            args=tuple(described["args"]),
            kwargs=tuple(described["kwargs"]),
            in_spec=decode_spec(described["in_spec"]),
            out_spec=decode_spec(described["out_spec"]),
            constants={int(k): _decode(v, {}) for k, v in described["constants"].items()},
            mutations=tuple((int(i), str(kind), str(n)) for i, kind, n in described["mutations"]),
        ),
        aliases=dict(data["aliases"]),
        door=data["door"],
        training=data["training"],
        label=data["label"],
        notes=list(data["notes"]),
        decoder=data.get("decoder"),
        derived={str(n): Derivation.from_dict(made) for n, made in data.get("derived", {}).items()},
        dropped={str(n): str(why) for n, why in data.get("dropped", {}).items()},
    )
    for position, node in enumerate(program.inputs()):
        if position in program.interface.constants:
            node.meta["val"] = program.interface.constants[position]
    propagate(program)
    return program


def _laid_out(tensor: Tensor, layout: dict[str, Any]) -> Tensor:
    """Lay a weight out in memory as it was: other strides, or another alignment, would round differently."""
    stride, offset = [int(s) for s in layout["stride"]], int(layout["offset"])
    extent = (
        1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True)) if tensor.numel() else 0
    )
    if extent > tensor.numel() + ALIGNMENT or extent < 0:  # overlapping or sparse: nothing a matrix product would see
        return tensor.clone()
    spare = ALIGNMENT // tensor.element_size()
    memory = torch.empty(extent + (spare if offset else 0), dtype=tensor.dtype)
    start = (offset - memory.data_ptr()) % ALIGNMENT // tensor.element_size()
    held = memory.as_strided(tensor.shape, stride, start if offset else 0)
    held.copy_(tensor)
    return held


def _placeholder(value: Any, mode: FakeTensorMode, symbols: dict[str, Any]) -> Any:
    if value is None:
        return None
    from torch._dynamo.source import ConstantSource  # brings in all of dynamo, and triton where installed

    shape_env = mode.shape_env
    assert shape_env is not None
    sizes = []
    for size, hint in zip(value["shape"], value["example"], strict=True):
        if isinstance(size, int):
            sizes.append(size)
            continue
        if size not in symbols:
            source = ConstantSource(f"size_{len(symbols)}")
            symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            symbols[size] = shape_env.create_symintnode(symbol, hint=hint, source=source)
        sizes.append(symbols[size])
    with mode:
        return torch.empty(sizes, dtype=_NAMED["dtype"][value["dtype"]])
