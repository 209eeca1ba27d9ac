"""Running an ONNX file with ONNX Runtime on torch tensors."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.lowering.base import Runner
from recast.patterns.errors import TargetError

__all__ = ["load_session", "needed", "runner"]

# Fusions of ONNX Runtime whose result is slower than what they replace: SkipLayerNormalization takes 4.5 ms for 4096 x 384
# on the CPU, Add and LayerNormalization together 1.1 ms (docs/onnx-kernels.md).
_SLOW = ("SkipLayerNormFusion",)


def needed(name: str) -> Any:
    """Import onnx, onnxscript or onnxruntime; raises TargetError with the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TargetError(
            f"target 'onnx': {name.partition('.')[0]} cannot be imported ({error}); pip install 'recast[onnx]'"
        ) from error


def load_session(model: bytes | Path, threads: int | None, integers: bool = False) -> Any:
    """Make an InferenceSession on the CPU.

    Parameters
    ----------
    model
        A serialized model, or its file.
    threads
        By default what torch uses.
    integers
        Make products of integers of those between QuantizeLinear and DequantizeLinear.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not integers:
        # Weights kept small in the file by DequantizeLinear are unpacked once, at load, and not in every call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Weights alone in integers stay so: with VNNI ONNX Runtime would round what they are multiplied with to bytes, too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return runtime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*_SLOW]
        )
    except Exception as error:  # onnxruntime has a class for every status; all mean the same here
        raise TargetError(
            f"target 'onnx': ONNX Runtime {runtime.__version__} does not load the model: {error}"
        ) from error


def runner(session: Any, inputs: Sequence[str | None], outputs: Sequence[Any]) -> Runner:
    """Call a session with flat leaves.

    Parameters
    ----------
    inputs
        Name of each flat input, None for constants that the graph does not read.
    outputs
        Of each flat result ``["tensor", name]``, ``["int", name]`` or ``["constant", value]``.
    """
    taken = {value.name for value in session.get_inputs()}
    wanted = [name for kind, name in outputs if kind != "constant"]

    def run(leaves: list[Any]) -> list[Any]:
        feeds = {
            name: leaf.detach().cpu().contiguous().numpy()
            for name, leaf in zip(inputs, leaves, strict=True)
            if name in taken and isinstance(leaf, Tensor)
        }
        try:
            found = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        except Exception as error:  # as above
            raise TargetError(f"target 'onnx': ONNX Runtime refused the call: {error}") from error
        results: list[Any] = []
        for kind, value in outputs:
            if kind == "constant":
                results.append(value)
            else:
                results.append(int(found[value]) if kind == "int" else torch.from_numpy(found[value]))
        return results

    return run
