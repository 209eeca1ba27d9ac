"""A Llama-shaped decoder generating at batch 1 on a CPU: recast beside torch.compile and onnxruntime-genai, in one process.

Two figures a contestant: milliseconds to the first token of a prompt, and for each token after it. Weights are random; times do not
depend on them. All of PyTorch's contestants share one set of weights and generate with a static cache.

    python -m benchmarks.decoder_cpu --json FILE [--layers 16] [--width 2048] [--vocabulary 30000] [--prompt 128] [--tokens 16]
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Contestant, Ready, Result, bytes_of, measure

RECIPES = ("dense", "int8", "int4(group=128, clip=false)")
BASELINE = "torch.compile fp32"


def decoder(layers: int, width: int, vocabulary: int) -> Any:
    """The shape of TinyLlama: eight key and value heads, heads of 64, a gated MLP of 2.75 times the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256), max_position_embeddings=2048,
        eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Torch:
    """One way to run the model; `generate(ids, n)` gives n more tokens."""

    def __init__(self, model: Any, **compiling: Any) -> None:
        self.model = copy.copy(model)  # the same weights, another compiled call
        self.model._modules = dict(model._modules)
        if compiling:
            self.model.compile(**compiling)

    def __call__(self, ids: Tensor, count: int) -> Tensor:
        with torch.no_grad():
            made: Tensor = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                cache_implementation="static", max_length=None,
            )  # fmt: skip
        return made


def _nbytes(model: Any) -> int:
    """Of the matrices that are multiplied, as recast's reports count."""
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))


def contestants(model: Any, folder: Path, only: str) -> list[Contestant]:
    """Eager and compiled PyTorch, recast's recipes as a backend, onnxruntime-genai with weights of four bits."""

    def torch_way(half: bool, compiled: bool) -> Ready:
        own = copy.deepcopy(model).to(torch.bfloat16) if half else model
        return Ready(Torch(own, **({"backend": "inductor"} if compiled else {})), _nbytes(own))

    def recast_way(recipe: str) -> Ready:
        from recast import backend

        run = Torch(model, backend="recast", options={"recipe": recipe})
        before = len(backend.reports())
        run(torch.ones(1, 4, dtype=torch.int64), 2)
        report = backend.reports()[before]
        kernels = sorted({row.kernel for row in report.rows if row.kernel})
        return Ready(run, report.bytes_after, ", ".join(kernels))

    found = [
        Contestant("PyTorch eager fp32", lambda: torch_way(False, False), "eager"),
        Contestant(BASELINE, lambda: torch_way(False, True), "inductor"),
        Contestant("torch.compile bf16", lambda: torch_way(True, True), "inductor"),
        Contestant("genai int4", lambda: _genai(model, folder), "onnx", requires=("onnxruntime_genai",)),
    ]
    against = (BASELINE, "torch.compile bf16")
    for recipe in RECIPES:
        held = (*against, "genai int4") if recipe.startswith("int4") else against
        found.append(
            Contestant(f"recast {recipe}", lambda recipe=recipe: recast_way(recipe), "inductor", "recast", (), held)
        )
    return [one for one in found if one.name == BASELINE or re.search(only, one.name)]


def _genai(model: Any, folder: Path) -> Ready:
    import onnxruntime_genai as genai

    saved, made = folder / "saved", folder / "genai"
    model.save_pretrained(saved)
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(saved),
        "-o",
        str(made),
        "-p",
        "int4",
    ]
    command += [
        "-e",
        "cpu",
        "-c",
        str(folder / "cache"),
        "--extra_options",
        "int4_block_size=128",
        "int4_accuracy_level=4",
    ]
    subprocess.run(command, check=True, capture_output=True)
    loaded = genai.Model(str(made))

    def run(ids: Tensor, count: int) -> Tensor:
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=ids.shape[1] + count, min_length=ids.shape[1] + count)
        generator = genai.Generator(loaded, parameters)
        generator.append_tokens(ids.numpy())
        for _ in range(count):
            generator.generate_next_token()
        return torch.from_numpy(generator.get_sequence(0))[None]

    return Ready(run, bytes_of(*made.glob("model.onnx*")), "x in int8 (accuracy level 4)")


def times(first: Result, all_: Result, count: int) -> list[dict[str, Any]]:
    """Milliseconds to the first token and for each of the others, from the medians of both runs."""
    rows = []
    for row in all_.rows:
        alone = first.row(row.name)
        if not row.samples or alone is None:
            rows.append({"name": row.name, "absent": row.absent})
            continue
        begin, end = alone.quartiles()[1], row.quartiles()[1]
        each = (end - begin) / (count - 1)
        rows.append({
            "name": row.name, "bytes": row.bytes, "first token": round(begin, 2), "each token": round(each, 2),
            "tokens a second": round(1e3 / each, 2), "note": row.note,
        })  # fmt: skip
    base = next((row for row in rows if row["name"] == BASELINE and "first token" in row), None)
    for row in rows:
        if base is not None and "first token" in row:
            row |= {f"{key} / {BASELINE}": round(row[key] / base[key], 3) for key in ("first token", "each token")}
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prepare everybody once, time the first token, then all, and write both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    for name, value in (
        ("layers", 16),
        ("width", 2048),
        ("vocabulary", 30000),
        ("prompt", 128),
        ("tokens", 16),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants whose name matches, and the baseline")
    given = parser.parse_args(arguments)
    model = decoder(given.layers, given.width, given.vocabulary)
    ids = torch.randint(2, given.vocabulary, (1, given.prompt))
    settings = {k: getattr(given, k) for k in ("layers", "width", "vocabulary", "prompt", "tokens")}
    settings["parameters"] = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as name:
        prepared: dict[str, Ready] = {}

        def once(one: Contestant, count: int) -> Contestant:
            def prepare() -> Ready:
                ready = prepared.setdefault(one.name, None) or one.prepare()  # type: ignore[arg-type]
                prepared[one.name] = ready
                return Ready(lambda ids: ready.run(ids, count), ready.bytes, ready.note)

            return Contestant(one.name, prepare, one.target, one.group, one.requires, one.against)

        found = contestants(model, Path(name), given.only)
        results = [
            measure(
                f"decoder_cpu, {count} tokens", [once(one, count) for one in found], ids, baseline=BASELINE,
                rounds=given.rounds, warmup=2, settings=settings, log=lambda text: print(text, file=sys.stderr),
            )
            for count in (1, given.tokens)
        ]  # fmt: skip
    for result in results:
        result.print()
    rows = times(results[0], results[1], given.tokens)
    for row in rows:
        print({k: v for k, v in row.items() if k != "note"})
    if given.json:
        whole = {"benchmark": "decoder_cpu", "rows": rows, "runs": [result.to_dict() for result in results]}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
