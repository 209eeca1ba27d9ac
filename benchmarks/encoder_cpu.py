"""MiniLM-L6 on a CPU, 32 sentences x 128 tokens: recast beside PyTorch, ONNX Runtime and OpenVINO, in one process.

python -m benchmarks.encoder_cpu --json benchmarks/results/encoder_cpu.json [--batch 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoder_inputs import BATCH, TOKENS, cosines, encoder, texts
from benchmarks.encoder_peers import BEST_INT8_ORT, ONNX, Bench, export, openvino_session, peers
from benchmarks.harness import Contestant, Ready, bytes_of, has_bf16, measure
from recast.kernels.quantized_matmul.ops import largest_exact_code


def recast_contestants(bench: Bench) -> dict[str, Contestant]:
    """recast's recipes on each target, by name.

    A contestant's `prepare()` returns `Ready(run, bytes, note)`: `run((ids, mask))` gives the embeddings [32, 384],
    `bytes` are those of the files needed at run time. `group="recast"`; `against` names the peers a row is held to.
    """
    return {**_on_inductor(bench), **_on_onnx(bench), **_from_onnx(bench), **_as_qdq(bench)}


def _narrow() -> str:
    """Codes of 7 bits where this CPU's products of bytes would saturate."""
    return "" if largest_exact_code() >= 127 else ", reduce_range=true"


def _on_inductor(bench: Bench) -> dict[str, Contestant]:
    tokens = f"int8(activations=true{_narrow()})"
    recipes: dict[str, Any] = {
        "dense": None,
        "int8 activations per token": tokens,
        "int8 static": f"int8(activations=true, static=true{_narrow()})",
        "low rank 0.5": "low_rank(ratio=0.5)",
    }
    if has_bf16():
        recipes["dense, bf16"] = {"compute_dtype": "bf16", "default": "dense"}
        recipes["int8 activations per token, bf16"] = {"compute_dtype": "bf16", "default": tokens}

    def contestant(name: str, recipe: Any) -> Contestant:
        def prepare() -> Ready:
            import recast

            program = recast.capture(bench.model, bench.texts.padded)
            if recipe is not None:
                statistics = recast.calibrate(program, bench.texts.calibration)
                decided = recast.plan(program, recipe, statistics)
                program = recast.rewrite(program, decided, pictures=False, measure=False)
            artifact = recast.lower(program, target="inductor")
            folder = bench.folder / f"recast-{len(list(bench.folder.glob('recast-*')))}"
            artifact.save(folder)
            kernels = sorted({row.kernel for row in artifact.report.rows if row.kernel})
            return Ready(lambda inputs: artifact(*inputs), bytes_of(folder / "weights.safetensors"), ", ".join(kernels))

        against = ("torch.compile bf16", "torch.compile fp32")
        return Contestant(f"recast inductor, {name}", prepare, "inductor", "recast", (), against)

    made = [contestant(name, recipe) for name, recipe in recipes.items()]
    return {one.name: one for one in made}


def _on_onnx(bench: Bench) -> dict[str, Contestant]:
    rounded = f"int8(activations=true{_narrow()})"
    shared = f"int8(activations=true, per_token=false{_narrow()})"
    recipes: dict[str, tuple[Any, tuple[str, ...]]] = {
        "dense": (None, ("ORT fp32", "ORT fusions fp32")),
        "int8": ("int8", ("ORT fp32", "ORT fusions fp32")),
        "int8 activations per tensor": (shared, BEST_INT8_ORT),
        # The sums behind the activation function have outliers: there each token has a scale of its own.
        "int8 activations, per token after GELU": (
            {"rules": [{"match": r"re:.*layer\.\d+\.output\.dense", "form": rounded}], "default": shared},
            BEST_INT8_ORT,
        ),
        "int8 activations per token": (rounded, BEST_INT8_ORT),
        "int4 group 32": ("int4(group=32)", ("ORT fp32", "ORT fusions fp32")),
    }

    def contestant(name: str, recipe: Any, against: tuple[str, ...]) -> Contestant:
        def prepare() -> Ready:
            import recast

            program = recast.capture(bench.model, bench.texts.padded)
            if recipe is not None:
                program = recast.rewrite(program, recast.plan(program, recipe), pictures=False, measure=False)
            artifact = recast.lower(program, target="onnx", threads=bench.threads)
            folder = bench.folder / f"recast-{len(list(bench.folder.glob('recast-*')))}"
            artifact.save(folder)
            kernels = sorted({row.kernel for row in artifact.report.rows if row.kernel})
            bench.found[name] = artifact(*bench.texts.timed)
            return Ready(lambda inputs: artifact(*inputs), bytes_of(folder / "model.onnx"), ", ".join(kernels))

        return Contestant(f"recast onnx, {name}", prepare, "onnx", "recast", (*ONNX, "onnxscript"), against)

    made = [contestant(name, recipe, against) for name, (recipe, against) in recipes.items()]
    return {one.name: one for one in made}


def _from_onnx(bench: Bench) -> dict[str, Contestant]:
    """Files of torch's exporters, read and rewritten: held to the file that recast writes from the torch model."""
    exporters = {"dynamo": True, "TorchScript": False}
    recipes = {"dense": "dense", "int8 activations per token": f"int8(activations=true{_narrow()})"}

    def contestant(exporter: str, name: str) -> Contestant:
        def prepare() -> Ready:
            import recast

            given = bench.folder / f"given-{exporter}.onnx"
            path = export(bench.model, bench.texts, given, dynamo=exporters[exporter])
            program = recast.capture(path)
            program = recast.rewrite(program, recast.plan(program, recipes[name]), pictures=False, measure=False)
            artifact = recast.lower(program, target="onnx", threads=bench.threads)
            folder = bench.folder / f"recast-{len(list(bench.folder.glob('recast-*')))}"
            artifact.save(folder)

            def run(inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
                return artifact(*inputs)["embeddings"]

            wanted, note = bench.found.get(name), ""
            if wanted is not None:
                gap = float((run(bench.texts.timed) - wanted).abs().max() / wanted.abs().max())
                note = f"largest difference from recast onnx, {name}: {gap:.1e}"
            return Ready(run, bytes_of(folder / "model.onnx"), note)

        row = f"recast from ONNX ({exporter}), {name}"
        return Contestant(row, prepare, "onnx", "recast", (*ONNX, "onnxscript"), (f"recast onnx, {name}",))

    made = [contestant(exporter, name) for name in recipes for exporter in exporters]
    return {one.name: one for one in made}


def _as_qdq(bench: Bench) -> dict[str, Contestant]:
    """One file of standard operators, read by OpenVINO and by ONNX Runtime."""

    def written(recipe: str, embeddings: str | None) -> tuple[Any, Path]:
        import recast

        program = recast.capture(bench.model, bench.texts.padded)
        statistics = recast.calibrate(program, bench.texts.calibration)
        program = recast.rewrite(program, recast.plan(program, recipe, statistics), pictures=False, measure=False)
        artifact = recast.lower(program, target="onnx", style="qdq", threads=bench.threads, embeddings=embeddings)
        folder = bench.folder / f"recast-{len(list(bench.folder.glob('recast-*')))}"
        artifact.save(folder)
        return artifact, folder / "model.onnx"

    def in_openvino(recipe: str, embeddings: str | None) -> Ready:
        import openvino

        path = written(recipe, embeddings)[1]
        run, used = openvino_session(openvino.Core().read_model(path), bench.threads, "f32")
        return Ready(run, bytes_of(path), "" if used == "f32" else f"ran in {used}")

    def in_onnxruntime(recipe: str, embeddings: str | None) -> Ready:
        artifact, path = written(recipe, embeddings)
        return Ready(lambda inputs: artifact(*inputs), bytes_of(path), "")

    static = f"int8(activations=true, static=true{_narrow()})"
    smoothed = f"smoothquant(base='{static}', alpha=0.75, shared=true)"
    recipes = {
        "int8 static": (static, None),
        "int8 static, smoothed": (smoothed, None),
        "int8 static, smoothed, int4 embeddings": (smoothed, "int4(group=32)"),
    }
    made = []
    for name, (recipe, embeddings) in recipes.items():
        made.append(
            Contestant(
                f"recast QDQ in OpenVINO, {name}",
                functools.partial(in_openvino, recipe, embeddings),
                "openvino",
                "recast",
                (*ONNX, "openvino"),
                ("OpenVINO NNCF int8",),
            )
        )
        made.append(
            Contestant(
                f"recast QDQ in ONNX Runtime, {name}",
                functools.partial(in_onnxruntime, recipe, embeddings),
                "onnx",
                "recast",
                ONNX,
                BEST_INT8_ORT,
            )
        )
    return {one.name: one for one in made}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder_cpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--quick", action="store_true", help="three rounds instead of fifteen: a look, not a measurement"
    )
    parser.add_argument("--rounds", type=int, help="rounds, each one timed call of everybody")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"passages that are timed together (default: {BATCH})")
    parser.add_argument("--threads", type=int, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants whose name matches, and the baseline")
    chosen = parser.parse_args(arguments)

    start = time.monotonic()
    torch.set_num_threads(chosen.threads)
    baseline = "PyTorch eager"
    model, given = encoder(), texts()
    given = dataclasses.replace(given, timed=(given.timed[0][: chosen.batch], given.timed[1][: chosen.batch]))
    with torch.no_grad():
        references = [(batch, model(*batch)) for batch in (given.timed, given.padded)]

    def assess(run: Callable[[Any], Any]) -> dict[str, float]:
        outputs = [(reference, run(batch)) for batch, reference in references]
        if any(output is None for _, output in outputs):  # the floor computes nothing meant
            return {}
        found = torch.cat([cosines(reference, output) for reference, output in outputs])
        return {"mean cosine": found.mean().item(), "worst cosine": found.min().item()}

    with tempfile.TemporaryDirectory(prefix="recast-bench-") as folder:
        bench = Bench(model, given, Path(folder), chosen.threads)
        everybody = [*recast_contestants(bench).values(), *peers(bench)]
        # Peers first and the floor last, whatever order they come in.
        everybody.sort(key=lambda one: ("peer", "recast", "floor").index(one.group))
        result = measure(
            "encoder_cpu",
            [one for one in everybody if one.name == baseline or re.search(chosen.only, one.name)],
            given.timed,
            baseline=baseline,
            rounds=chosen.rounds or (3 if chosen.quick else 15),
            warmup=2,
            assess=assess,
            settings={"model": "MiniLM-L6", "batch": len(given.timed[0]), "tokens": TOKENS, "threads": chosen.threads},
            log=lambda text: print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True),
        )
    result.print()
    if chosen.json:
        result.save(chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
