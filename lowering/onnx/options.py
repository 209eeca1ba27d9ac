"""Options of the ONNX target: which values there are, and which do not go together."""

from __future__ import annotations

from recast.patterns.errors import TargetError

__all__ = ["check_options"]


def check_options(
    opset: int,
    accuracy_level: int,
    attention: str,
    genai: bool,
    logits: str,
    embeddings: str | None,
    style: str,
    cache: str,
) -> None:
    """Raise TargetError for a value that there is not, and for options that exclude each other; see `OnnxRuntime`."""
    if opset < 21:
        raise TargetError(f"target 'onnx': opset is {opset}, at least 21 is needed")
    if accuracy_level not in (0, 4):
        raise TargetError(
            f"target 'onnx': accuracy_level is {accuracy_level}; 0 (exact) or 4 (int8 activations) would work"
        )
    if attention not in ("auto", "grouped", "standard"):
        raise TargetError(f"target 'onnx': attention is {attention!r}; 'auto', 'grouped' or 'standard' would work")
    if logits not in ("last", "all"):
        raise TargetError(f"target 'onnx': logits is {logits!r}; 'last' or 'all' would work")
    if style not in ("qoperator", "qdq"):
        raise TargetError(f"target 'onnx': style is {style!r}; 'qoperator' or 'qdq' would work")
    if cache not in ("float", "int8"):
        raise TargetError(f"target 'onnx': cache is {cache!r}; 'float' or 'int8' would work")
    if cache == "int8" and (attention == "grouped" or genai):
        raise TargetError(
            "target 'onnx': cache='int8' has a scale for each head and token, which neither GroupQueryAttention nor "
            "onnxruntime-genai takes; it goes with attention='standard' and without genai"
        )
    if style == "qdq" and (attention == "grouped" or accuracy_level or genai):
        raise TargetError(
            "target 'onnx': style='qdq' is of standard operators alone; attention='grouped', accuracy_level and genai are of "
            "ONNX Runtime's own and go with style='qoperator'"
        )
