"""ONNX files made by hand and by others' exporters, and what onnxruntime gives for them."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

CONTRIB = "com.microsoft"
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
    torch.uint8: TensorProto.UINT8,
    torch.float16: TensorProto.FLOAT16,
}


def file_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[torch.dtype, Sequence[int | str]]],
    outputs: Sequence[str],
    constants: Mapping[str, Any] = {},
    *,
    opset: int = 21,
    contrib: bool = True,
) -> onnx.ModelProto:
    """A model of these nodes; tensors among the constants become initializers."""
    given = [
        helper.make_tensor_value_info(name, ELEMENTS[dtype], list(shape)) for name, (dtype, shape) in inputs.items()
    ]
    made = [onnx.ValueInfoProto(name=name) for name in outputs]
    held = [numpy_helper.from_array(_array(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(CONTRIB, 1)] if contrib else [])
    return helper.make_model(helper.make_graph(nodes, "made", given, made, held), opset_imports=opsets, ir_version=10)


def _array(value: Any) -> Any:
    return np.array(value.numpy() if isinstance(value, Tensor) else value, order="C")


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def by_onnxruntime(model: onnx.ModelProto | Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What onnxruntime gives, without its own rewriting."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    feeds = {name: value.numpy() for name, value in inputs.items() if name in taken}
    names = [value.name for value in session.get_outputs()]
    return {name: torch.from_numpy(np.asarray(v)) for name, v in zip(names, session.run(None, feeds), strict=True)}


class Named(torch.nn.Module):
    """A transformer with its inputs by position, giving one tensor."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return result


def exported(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], path: Path, *, dynamo: bool, opset: int = 18
) -> Path:
    """Write a transformer as torch's exporters do, batch and sequence (of inputs of two dimensions) free."""
    named = Named(model, list(inputs)).eval()
    free = {name: {0: "batch", 1: "sequence"} if value.ndim == 2 else {0: "batch"} for name, value in inputs.items()}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                shapes = (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free.values()),)
                torch.onnx.export(
                    named, tuple(inputs.values()), path, dynamo=True, dynamic_shapes=shapes, external_data=False,
                    input_names=list(inputs), output_names=["hidden"], opset_version=opset, verbose=False,
                )  # fmt: skip
            else:
                torch.onnx.export(
                    named, tuple(inputs.values()), path, dynamo=False, opset_version=opset,
                    input_names=list(inputs), output_names=["hidden"],
                    dynamic_axes={**free, "hidden": {0: "batch"}},
                )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return path
