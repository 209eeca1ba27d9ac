"""One way of generating with a decoder, made or run in a process of its own; see `benchmarks.decoder_processes`.

    python -m benchmarks.decoder_processes_one make|run WAY FOLDER '{"layers": 4, ...}'

`make` writes what a way loads, `run` prints one line of JSON: seconds to load, to the first token and for each after it, and memory.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["WAYS", "built_by_genai", "saved_model"]

# What each way is made with: recast's recipe and options of the target, the options of onnxruntime-genai's builder.
_SMALL = "int4(group={}, clip=false)"
WAYS: dict[str, Mapping[str, Any]] = {
    "torch.compile fp32": {"kind": "compile"},
    "torch.compile bf16": {"kind": "compile", "dtype": "bfloat16"},  # emulated, and slow, where the CPU has none
    "recast inductor int4 group 128, bf16": {
        "kind": "compile", "dtype": "bfloat16", "recast": {"recipe": _SMALL.format(128), "accuracy_level": 4, "release_dense": True},
    },
    "genai int4 block 32": {"kind": "genai", "options": ("block_size=32", "accuracy_level=4")},
    "genai int4 block 128": {"kind": "genai", "options": ("block_size=128", "accuracy_level=4")},
    "genai int4 block 128, pruned head": {
        "kind": "genai", "options": ("block_size=128", "accuracy_level=4", "prune_lm_head=true"),
    },
    **{
        f"recast int4 group {group}, level {level}": {
            "kind": "recast", "recipe": _SMALL.format(group), "options": {"accuracy_level": level},
        }
        for group in (32, 128)
        for level in (0, 4)
    },
    "recast int4 group 128, level 4, all logits": {
        "kind": "recast", "recipe": _SMALL.format(128), "options": {"accuracy_level": 4, "logits": "all"},
    },
    "recast int4 group 128, level 4, dense head": {
        "kind": "recast", "recipe": {"default": _SMALL.format(128), "exclude": ["lm_head"]}, "options": {"accuracy_level": 4},
    },
    "recast int4 group 128, level 4, embeddings": {
        "kind": "recast", "recipe": _SMALL.format(128), "options": {"accuracy_level": 4, "embeddings": "int4(group=128)"},
    },
}  # fmt: skip


def saved_model(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    """Write the decoder for everyone, with a tokenizer and an end of text, without which genai's builder does not work."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.decoder_cpu import decoder

    model = decoder(layers, width, vocabulary)
    for config in (model.config, model.generation_config):
        config.eos_token_id = vocabulary - 1
    model.save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(folder)


def built_by_genai(saved: Path, folder: Path, options: tuple[str, ...]) -> None:
    """Run onnxruntime-genai's builder, for weights of four bits on a CPU."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        saved,
        "-o",
        folder,
        "-p",
        "int4",
        "-e",
        "cpu",
    ]
    command += ["-c", folder / "cache", "--extra_options", *options]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def make(way: Mapping[str, Any], saved: Path, folder: Path) -> None:
    if way["kind"] == "genai":
        built_by_genai(saved, folder, way["options"])
    elif way["kind"] == "recast":
        import torch
        from transformers import AutoModelForCausalLM

        import recast

        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        program = recast.capture(model, (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)
        small = recast.rewrite(program, recast.plan(program, recast.Recipe.of(way["recipe"])), verification=False)
        recast.lower(small, target="onnx", **way["options"]).save(folder, force=True)


def run(way: Mapping[str, Any], saved: Path, folder: Path, given: Mapping[str, int]) -> dict[str, float]:
    """Load, generate once to warm up, and generate."""
    import numpy as np

    ids = np.random.default_rng(0).integers(2, given["vocabulary"] - 1, given["prompt"]).tolist()
    kinds = {"recast": _recast, "genai": _genai, "compile": functools.partial(_compile, way)}
    ready = kinds[way["kind"]]
    generate, imported, load = ready(saved, folder, given["threads"])
    generate(ids, 2)
    clock = [time.process_time()]
    generate(ids, 2)
    clock.append(time.process_time())
    first, each = generate(ids, given["tokens"])
    clock.append(time.process_time())
    short, long = clock[1] - clock[0], clock[2] - clock[1]
    return {
        "load": load, "first token": first, "each token": each, "tokens a second": 1 / each,
        "processor, two tokens": short, "processor, each token": (long - short) / (given["tokens"] - 2),
        "peak MiB": _memory("VmHWM"), "imported MiB": imported,
    }  # fmt: skip


def _memory(name: str) -> float:
    # Not getrusage's: that of a process that was started by a larger one begins with the larger one's.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def _recast(saved: Path, folder: Path, threads: int) -> Any:
    import onnxruntime  # noqa: F401  # as a peer's import, before the clock runs
    import torch

    import recast

    torch.set_num_threads(threads)
    imported, begin = _memory("VmRSS"), time.perf_counter()
    generator = recast.Generator(folder)
    load = time.perf_counter() - begin

    def generate(ids: list[int], count: int) -> tuple[float, float]:
        found = generator.generate([ids], count, stop=())
        assert len(found.ids[0]) == count
        return found.first_seconds, found.other_seconds / found.steps

    return generate, imported, load


def _genai(saved: Path, folder: Path, threads: int) -> Any:
    import onnxruntime_genai as genai

    description = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    description["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (folder / "genai_config.json").write_text(json.dumps(description), encoding="utf-8")
    imported, begin = _memory("VmRSS"), time.perf_counter()
    model = genai.Model(str(folder))
    load = time.perf_counter() - begin

    def generate(ids: list[int], count: int) -> tuple[float, float]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + count, min_length=len(ids) + count, do_sample=False)
        generator = genai.Generator(model, parameters)
        begin = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        return first - begin, (time.perf_counter() - first) / (count - 1)

    return generate, imported, load


def _compile(way: Mapping[str, Any], saved: Path, folder: Path, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.decoder_cpu import Torch

    torch.set_num_threads(threads)
    imported, begin = _memory("VmRSS"), time.perf_counter()
    backend = {"backend": "recast", "options": dict(way["recast"])} if "recast" in way else {"backend": "inductor"}
    dtype = getattr(torch, way.get("dtype", "float32"))
    model = Torch(AutoModelForCausalLM.from_pretrained(saved, dtype=dtype).eval(), **backend)
    load = time.perf_counter() - begin

    def generate(ids: list[int], count: int) -> tuple[float, float]:
        rows, seconds = torch.tensor([ids]), []
        for number in (1, 1, count, count):  # of each length the first compiles
            begin = time.perf_counter()
            model(rows, number)
            seconds.append(time.perf_counter() - begin)
        return seconds[1], (seconds[3] - seconds[1]) / (count - 1)

    return generate, imported, load


def main(what: str, name: str, folder: str, given: str) -> int:
    way, root, settings = WAYS.get(name, {}), Path(folder), json.loads(given)
    own = root / "".join(c if c.isalnum() else "_" for c in name)
    if name == "saved":
        saved_model(root / "saved", settings["layers"], settings["width"], settings["vocabulary"])
    elif what == "make":
        make(way, root / "saved", own)
    else:
        print(json.dumps(run(way, root / "saved", own, settings)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
