"""What recast is measured beside in `encoder_cpu`: the same model through PyTorch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encoder_inputs import Encoder, Texts
from benchmarks.harness import Contestant, Ready, bytes_of

ONNX = ("onnx", "onnxruntime")
BEST_INT8_ORT = ("ORT int8 per channel", "ORT fusions + int8 per channel", "ORT optimizer + int8 per channel")


@dataclass
class Bench:
    """What every contestant gets: the model (not to be changed), the texts, a folder for files, a number of threads."""

    model: Encoder
    texts: Texts
    folder: Path
    threads: int
    found: dict[str, Tensor] = field(
        default_factory=dict
    )  # embeddings of the timed batch, for rows that are to give the same


def peers(bench: Bench) -> list[Contestant]:
    """PyTorch, ONNX Runtime, OpenVINO, and the floor."""
    return [*_torch(bench), *_onnxruntime(bench), *_openvino(bench), *_floor(bench)]


# -- PyTorch ---------------------------------------------------------------------------------------


def _torch(bench: Bench) -> list[Contestant]:
    def prepare(dtype: torch.dtype, compiled: bool, **options: Any) -> Ready:
        model = copy.deepcopy(bench.model).to(dtype)
        size = sum(t.numel() * t.element_size() for t in model.parameters())
        call: Callable[..., Tensor] = torch.compile(model, dynamic=False, **options) if compiled else model

        def run(inputs: tuple[Tensor, Tensor]) -> Tensor:
            with torch.no_grad():
                return call(*inputs)

        return Ready(run, size)

    f32, bf16 = torch.float32, torch.bfloat16
    freezing = {"options": {"freezing": True}}
    return [
        Contestant("PyTorch eager", lambda: prepare(f32, False), "eager"),
        Contestant("torch.compile fp32", lambda: prepare(f32, True), "inductor"),
        Contestant("torch.compile fp32, freezing", lambda: prepare(f32, True, **freezing), "inductor"),
        Contestant("torch.compile bf16", lambda: prepare(bf16, True), "inductor"),
        Contestant("torch.compile bf16, freezing", lambda: prepare(bf16, True, **freezing), "inductor"),
    ]


# -- ONNX Runtime ----------------------------------------------------------------------------------


def export(model: nn.Module, texts: Texts, path: Path, dynamo: bool = True) -> Path:
    """The model as an ONNX file with free batch and sequence, written once; or by the older exporter, which runs TorchScript."""
    names = ["input_ids", "attention_mask"]
    if dynamo:
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        asked = {"opset_version": 20, "dynamic_shapes": (free, free), "external_data": False, "verbose": False}
    else:
        asked = {"opset_version": 17, "dynamic_axes": {name: {0: "batch", 1: "sequence"} for name in names}}
    if not path.exists():
        wanted: dict[str, Any] = {"dynamo": dynamo, "input_names": names, "output_names": ["embeddings"], **asked}
        with quiet():
            torch.onnx.export(copy.deepcopy(model), texts.padded, path, **wanted)
    return path


def session(path: Path, threads: int) -> Callable[[tuple[Tensor, Tensor]], Any]:
    """Run an ONNX file with ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, Tensor]) -> Any:
        return loaded.run(None, {"input_ids": inputs[0].numpy(), "attention_mask": inputs[1].numpy()})[0]

    return run


def _onnxruntime(bench: Bench) -> list[Contestant]:
    folder = bench.folder

    def plain() -> Path:
        return export(bench.model, bench.texts, folder / "plain.onnx")

    def fused() -> Path:
        path = folder / "fused.onnx"
        if not path.exists():
            import onnx_ir
            from onnxscript.rewriter.ort_fusions import optimize_for_ort

            model, counts = optimize_for_ort(onnx_ir.load(plain()))
            onnx_ir.save(model, path)
            notes[path] = "fused: " + (", ".join(f"{k} {v}" for k, v in counts.items() if v) or "nothing")
        return path

    def optimized() -> Path:
        path = folder / "optimized.onnx"
        if not path.exists():
            from onnxruntime.transformers.optimizer import optimize_model

            config: Any = bench.model.model.config
            with quiet():
                model = optimize_model(
                    str(plain()), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
                )
                model.save_model_to_file(str(path))
            found = {k: v for k, v in model.get_fused_operator_statistics().items() if v}
            notes[path] = "fused: " + (", ".join(f"{k} {v}" for k, v in found.items()) or "nothing")
        return path

    def int8(source: Callable[[], Path], **options: Any) -> Callable[[], Path]:
        def make() -> Path:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            path = source()
            target = path.with_name(f"{path.stem}-{'-'.join(f'{k}{v}' for k, v in options.items())}.onnx")
            if not target.exists():
                with quiet():
                    quantize_dynamic(path, target, weight_type=QuantType.QInt8, **options)
            notes[target] = notes.get(path, "")
            return target

        return make

    notes: dict[Path, str] = {}

    def prepared(make: Callable[[], Path]) -> Callable[[], Ready]:
        def prepare() -> Ready:
            path = make()
            return Ready(session(path, bench.threads), bytes_of(path), notes.get(path, ""))

        return prepare

    per_channel = {"per_channel": True}
    # Without VNNI the kernels add two 8-bit products in 16 bits, which saturates; 7-bit weights avoid it.
    seven_bits = {"per_channel": True, "reduce_range": True}
    files: list[tuple[str, Callable[[], Path], tuple[str, ...]]] = [
        ("ORT fp32", plain, ONNX),
        ("ORT int8 per tensor", int8(plain, per_channel=False), ONNX),
        ("ORT int8 per channel", int8(plain, **per_channel), ONNX),
        ("ORT int8 per channel, 7 bits", int8(plain, **seven_bits), ONNX),
        ("ORT fusions fp32", fused, (*ONNX, "onnxscript")),
        ("ORT fusions + int8 per channel", int8(fused, **per_channel), (*ONNX, "onnxscript")),
        ("ORT fusions + int8 per channel, 7 bits", int8(fused, **seven_bits), (*ONNX, "onnxscript")),
        ("ORT optimizer fp32", optimized, ONNX),
        ("ORT optimizer + int8 per channel", int8(optimized, **per_channel), ONNX),
        ("ORT optimizer + int8 per channel, 7 bits", int8(optimized, **seven_bits), ONNX),
    ]
    return [Contestant(name, prepared(make), "onnx", requires=needs) for name, make, needs in files]


# -- OpenVINO --------------------------------------------------------------------------------------


def openvino_session(model: Any, threads: int, precision: str) -> tuple[Callable[[tuple[Tensor, Tensor]], Any], str]:
    """Run a model of OpenVINO on the CPU; also the precision that it really computes in."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def run(inputs: tuple[Tensor, Tensor]) -> Any:
        feed = {"input_ids": inputs[0].numpy(), "attention_mask": inputs[1].numpy()}
        return next(iter(request.infer(feed).values()))

    return run, compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()


def _openvino(bench: Bench) -> list[Contestant]:
    def prepare(precision: str, int8: bool = False) -> Ready:
        import openvino

        model = openvino.convert_model(export(bench.model, bench.texts, bench.folder / "plain.onnx"))
        if int8:
            import nncf

            rows = [(i[r : r + 1], m[r : r + 1]) for i, m in bench.texts.calibration for r in range(len(i))]
            feed = [{"input_ids": i.numpy(), "attention_mask": m.numpy()} for i, m in rows]
            with quiet():
                model = nncf.quantize(
                    model, nncf.Dataset(feed), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feed)
                )
        path = bench.folder / f"openvino-{precision}{'-int8' if int8 else ''}.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        run, used = openvino_session(model, bench.threads, precision)
        note = "" if used == precision else f"ran in {used}: this CPU has no {precision}"
        return Ready(run, bytes_of(path, path.with_suffix(".bin")), note)

    return [
        Contestant("OpenVINO fp32", lambda: prepare("f32"), "openvino", requires=("openvino", "onnx")),
        Contestant("OpenVINO bf16", lambda: prepare("bf16"), "openvino", requires=("openvino", "onnx")),
        Contestant(
            "OpenVINO NNCF int8", lambda: prepare("f32", True), "openvino", requires=("openvino", "nncf", "onnx")
        ),
    ]


# -- The floor -------------------------------------------------------------------------------------


def _floor(bench: Bench) -> list[Contestant]:
    """The matrix products of the model's Linear layers and nothing else; the products of attention are 5 % more."""
    batch, tokens = bench.texts.timed[0].shape
    weights = [
        m.weight.detach() for n, m in bench.model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n
    ]
    inputs = {w.shape[1]: torch.randn(batch * tokens, w.shape[1]) for w in weights}

    def dense(dtype: torch.dtype) -> Ready:
        held, given = [w.to(dtype) for w in weights], {n: x.to(dtype) for n, x in inputs.items()}

        def run(_: Any) -> None:
            with torch.no_grad():
                for w in held:
                    nn.functional.linear(given[w.shape[1]], w)

        return Ready(run, sum(w.numel() * w.element_size() for w in held))

    def int8() -> Ready:
        # oneDNN's int8 product as Inductor calls it: activations uint8, weights int8 in oneDNN's own layout.
        prepack, product = torch.ops.onednn.qlinear_prepack, torch.ops.onednn.qlinear_pointwise
        given = {n: torch.randint(0, 255, x.shape, dtype=torch.uint8) for n, x in inputs.items()}
        held = []
        for w in weights:
            values = torch.randint(-127, 127, w.shape, dtype=torch.int8)
            scales, zeros = torch.full((w.shape[0],), 0.01), torch.zeros(w.shape[0], dtype=torch.int64)
            held.append((w.shape[1], prepack(values, [batch * tokens, w.shape[1]]), scales, zeros))

        def run(_: Any) -> None:
            for n, packed, scales, zeros in held:
                product(given[n], 0.01, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")

        return Ready(run, sum(w.numel() for w in weights))

    def legacy() -> Ready:
        # FBGEMM's dynamic product (quantizes its float input); the int8 product torch has for CPUs without VNNI.
        before, held = torch.backends.quantized.engine, []
        torch.backends.quantized.engine = "fbgemm"
        try:
            with quiet():
                for w in weights:
                    scales, zeros = w.abs().amax(1) / 127, torch.zeros(w.shape[0], dtype=torch.int64)
                    values = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
                    held.append((w.shape[1], torch.ops.quantized.linear_prepack(values, None)))
        finally:
            torch.backends.quantized.engine = before

        def run(_: Any) -> None:
            for n, packed in held:
                torch.ops.quantized.linear_dynamic(inputs[n], packed, True)

        return Ready(run, sum(w.numel() for w in weights))

    return [
        Contestant("floor: products fp32", lambda: dense(torch.float32), "eager", "floor"),
        Contestant("floor: products bf16", lambda: dense(torch.bfloat16), "eager", "floor"),
        Contestant("floor: products int8, oneDNN", int8, "eager", "floor"),
        Contestant("floor: products int8, FBGEMM", legacy, "eager", "floor"),
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters and quantizers print and log while they work; errors come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
