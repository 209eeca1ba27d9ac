"""Reading an ``.onnx`` file: what is in it is data, from its own folder only, and every way to be damaged has one message."""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recast.patterns.capture.onnx.graph import DTYPES, Graph, Input, Node
from recast.patterns.capture.onnx.values import Known
from recast.patterns.errors import ModelError, TargetError

__all__ = ["check_file", "read"]

OLDEST = 7  # what onnx's own converter takes in reliably; the operators here are written for 11 and later
_WRITTEN_FOR = 11
# Stored in numpy's types of another meaning: torch reads the same bytes.
_REINTERPRETED = {
    16: (np.uint16, torch.bfloat16),
    17: (np.uint8, torch.float8_e4m3fn),
    18: (np.uint8, torch.float8_e4m3fnuz),
    19: (np.uint8, torch.float8_e5m2),
    20: (np.uint8, torch.float8_e5m2fnuz),
}


def read(path: str | os.PathLike[str]) -> Graph:
    """Read a file, with the weights that lie beside it.

    Parameters
    ----------
    path
        Of the ``.onnx`` file. Weights in files of their own are mapped into memory, not read.

    Raises
    ------
    ModelError
        The file is missing, cut short or no ONNX model; its weights are missing, cut short or outside its folder; it has an opset
        that is too old or too new, or types that torch does not have.
    TargetError
        The package onnx is not installed.
    """
    file = Path(path)
    onnx = _onnx(file)
    model = _parsed(onnx, file)
    model = _inlined(_recent(onnx, model, file), onnx)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    versions[""] = versions.pop("ai.onnx", versions.get("", 1))
    constants = {t.name: _tensor(onnx, t, file) for t in model.graph.initializer}
    if len(model.graph.sparse_initializer):
        name = model.graph.sparse_initializer[0].values.name
        raise ModelError(
            f"onnx: '{file}' holds '{name}' as a sparse tensor, which torch's graphs do not; store it dense"
        )
    nodes = []
    for proto in model.graph.node:
        node = _node(onnx, proto, versions, file)
        if node.operator == "Constant":
            constants[node.outputs[0]] = _constant(node, file)
        else:  # a tensor could not be read while the graph is traced; numbers can
            node.attributes.update(
                {k: Known.of(v.tolist(), v.dtype) for k, v in node.attributes.items() if isinstance(v, Tensor)}
            )
            nodes.append(node)
    inputs = [_input(value, file) for value in model.graph.input if value.name not in constants]
    graph = Graph(inputs, [value.name for value in model.graph.output], nodes, constants, label=file.stem)
    _check(graph, file)
    return graph


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is no ONNX file, or reads weights that are not there or outside its folder, before anything else opens it.

    Raises
    ------
    ModelError, TargetError
        See `read`.
    """
    file = Path(path)
    onnx = _onnx(file)
    for proto in _parsed(onnx, file).graph.initializer:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            _place(proto, file)


def _onnx(file: Path) -> Any:
    if not file.is_file():
        raise ModelError(f"onnx: there is no file '{file}'")
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise TargetError(
            f"the ONNX file '{file.name}' needs the package 'onnx', which is not installed; pip install 'recast[onnx]'"
        ) from error


def _parsed(onnx: Any, file: Path) -> Any:
    advice = "it may be cut short or of another format; copy or export it again"
    try:
        model = onnx.load(os.fspath(file), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's errors share no class of ours
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"onnx: '{file}' is not an ONNX model ({told}); {advice}") from error
    if not model.opset_import or not (model.graph.node or model.graph.output):
        raise ModelError(f"onnx: '{file}' is not an ONNX model (no operators and no opset in it); {advice}")
    return model


def _recent(onnx: Any, model: Any, file: Path) -> Any:
    """The model with operators of a version that is known here."""
    version = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), None)
    if version is None:
        return model
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise ModelError(
            f"onnx: '{file}' has opset {version}; onnx {onnx.__version__} knows those up to {newest}; "
            "install a newer onnx, or export with an older opset"
        )
    if version >= _WRITTEN_FOR:
        return model
    wanted = f"opset {version}, which is too old: {_WRITTEN_FOR} or later is needed"
    if version < OLDEST:
        raise ModelError(f"onnx: '{file}' has {wanted}; export it again with a newer opset")
    try:
        return onnx.version_converter.convert_version(model, _WRITTEN_FOR)
    except Exception as error:
        told = str(error).splitlines()[0]
        raise ModelError(
            f"onnx: '{file}' has {wanted}, and onnx cannot convert it ({told}); export it again"
        ) from error


def _inlined(model: Any, onnx: Any) -> Any:
    """The model without functions of its own."""
    return importlib.import_module("onnx.inliner").inline_local_functions(model) if len(model.functions) else model


def _check(graph: Graph, file: Path) -> None:
    known = {"", *(value.name for value in graph.inputs), *graph.constants}
    for node in graph.nodes:
        if unknown := [name for name in node.inputs if name not in known]:
            raise ModelError(
                f"onnx: '{file}': {node.operator} '{node.label}' reads '{unknown[0]}', which nothing before it makes; "
                "the file is damaged, export it again"
            )
        known.update(node.outputs)
    if missing := [name for name in graph.outputs if name not in known]:
        raise ModelError(f"onnx: '{file}' gives '{missing[0]}', which nothing in it makes; export it again")


# -- values ----------------------------------------------------------------------------------------


def _input(value: Any, file: Path) -> Input:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ModelError(
            f"onnx: input '{value.name}' of '{file}' is {str(kind).removesuffix('_type')}, not a tensor; only tensors can be read"
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in DTYPES:
        raise ModelError(
            f"onnx: input '{value.name}' of '{file}' has element type {tensor.elem_type}, which torch has not"
        )
    if not tensor.HasField("shape"):
        raise ModelError(
            f"onnx: input '{value.name}' of '{file}' has no shape, not even a number of dimensions; give it one "
            "(onnx.tools.update_model_dims)"
        )
    shape: list[int | str] = []
    for axis, size in enumerate(tensor.shape.dim):
        fixed = size.HasField("dim_value") and size.dim_value > 0
        shape.append(int(size.dim_value) if fixed else size.dim_param or f"size_{axis}")
    return Input(value.name, DTYPES[tensor.elem_type], tuple(shape))


def _tensor(onnx: Any, proto: Any, file: Path) -> Tensor:
    """A stored tensor; its bytes in the message are let go."""
    if proto.data_type not in DTYPES:
        name = onnx.TensorProto.DataType.Name(proto.data_type) if proto.data_type else "UNDEFINED"
        raise ModelError(f"onnx: '{proto.name}' in '{file}' is {name}, which torch does not hold; it cannot be read")
    shape = tuple(proto.dims)
    kind, dtype = _REINTERPRETED.get(proto.data_type, (None, DTYPES[proto.data_type]))
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        stored = kind or onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
        array = _external(proto, np.dtype(stored), file)
    else:
        try:
            array = onnx.numpy_helper.to_array(proto)
        except Exception as error:  # too few bytes for the shape, for one
            raise ModelError(f"onnx: '{proto.name}' in '{file}' is damaged: {error}") from error
        array = array.view(kind) if kind is not None else array
        array = array if array.flags.writeable else array.copy()
        proto.ClearField("raw_data")
    tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(shape))
    return tensor if kind is None else tensor.view(dtype)


def _place(proto: Any, file: Path) -> tuple[Path, int, int]:
    """File, offset and length of the bytes of a tensor that lies in a file of its own, in the model's folder."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    where = f"onnx: the weight '{proto.name}' of '{file}' lies in '{location}'"
    data = _inside(location, file, where)
    size = data.stat().st_size
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size - offset))
    except ValueError as error:
        raise ModelError(f"{where} at an offset that is no number: {entries}") from error
    if min(offset, length) < 0 or offset + length > size:
        raise ModelError(
            f"{where}, which is cut short: it has {size} bytes, {offset + length} are needed; copy it again, whole"
        )
    return data, offset, length


def _external(proto: Any, dtype: np.dtype[Any], file: Path) -> Any:
    """Map the bytes of a tensor in a file of its own."""
    data, offset, length = _place(proto, file)
    count = int(np.prod([int(s) for s in proto.dims], dtype=np.int64))
    if length < count * dtype.itemsize:
        raise ModelError(
            f"onnx: the weight '{proto.name}' of '{file}' has {length} bytes in '{data.name}'; {count} values of {dtype} take "
            f"{count * dtype.itemsize}"
        )
    if count == 0:
        return np.empty(proto.dims, dtype)
    # Copies on writing: a weight that is changed in memory leaves the file alone.
    return np.memmap(data, dtype, mode="c", offset=offset, shape=(count,))


def _inside(location: str, file: Path, where: str) -> Path:
    """Resolve a location; links are followed only to where the model itself lies (as in caches that keep files by content)."""
    parts = PurePosixPath(location).parts
    outside = (
        not location
        or PurePosixPath(location).is_absolute()
        or PureWindowsPath(location).drive
        or ".." in parts
        or "\\" in location
    )
    data = file.parent / location
    homes = {file.parent.resolve(), file.resolve().parent}
    if outside or not any(data.resolve().is_relative_to(home) for home in homes):
        raise ModelError(
            f"{where}, outside the model's folder, which is refused; put it beside the model and name it so"
        )
    if not data.is_file():
        raise ModelError(f"{where}, which is not there; copy it beside the model")
    return data


def _constant(node: Node, file: Path) -> Tensor:
    for name, value in node.attributes.items():
        if name == "value" and isinstance(value, Tensor):
            return value
        if (name.startswith("value_") and not isinstance(value, str | list)) or name in ("value_ints", "value_floats"):
            dtype = torch.int64 if "int" in name else torch.float32
            if "int" in name or "float" in name:
                return torch.tensor(value, dtype=dtype)
    raise ModelError(
        f"onnx: the constant '{node.label}' of '{file}' is given by {', '.join(node.attributes) or 'nothing'}; only tensors "
        "and numbers can be read"
    )


# -- nodes -----------------------------------------------------------------------------------------


def _node(onnx: Any, proto: Any, versions: dict[str, int], file: Path) -> Node:
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    attributes = {a.name: _attribute(onnx, a, file) for a in proto.attribute}
    outputs = list(proto.output)
    while outputs and not outputs[-1]:
        outputs.pop()
    inputs = list(proto.input)
    while inputs and not inputs[-1]:
        inputs.pop()
    if domain not in versions:
        raise ModelError(
            f"onnx: '{file}' uses {domain}::{proto.op_type} without saying which version of '{domain}'; export it again"
        )
    return Node(
        domain,
        proto.op_type,
        versions[domain],
        tuple(inputs),
        tuple(outputs),
        attributes,
        proto.name,
        _scope(proto),
    )


def _attribute(onnx: Any, attribute: Any, file: Path) -> Any:
    kinds = onnx.AttributeProto
    if attribute.type == kinds.TENSOR:
        return _tensor(onnx, attribute.t, file)
    if attribute.type == kinds.TENSORS:
        return [_tensor(onnx, t, file) for t in attribute.tensors]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == kinds.STRING:
        return value.decode("utf-8", "replace")
    if attribute.type == kinds.STRINGS:
        return [v.decode("utf-8", "replace") for v in value]
    return list(value) if attribute.type in (kinds.INTS, kinds.FLOATS, kinds.GRAPHS) else value


def _scope(proto: Any) -> str:
    """Module that a node came from, by what exporters leave behind: scopes, or names that are paths."""
    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                continue
            if isinstance(scopes, list) and len(scopes) > 1:  # the last is the operation itself
                return str(scopes[-2])
    for name in _paths(proto):
        *parts, _ = [part for part in name.split("/") if part]
        if parts:
            return ".".join(re.sub(r"[^\w.]+", "_", part) for part in parts)
    return ""


def _paths(proto: Any) -> Iterator[str]:
    yield from (name for name in (proto.name, *proto.output) if "/" in name.strip("/"))
