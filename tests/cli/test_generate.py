"""`recast optimize --cache` and `recast generate`, from a directory to text."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import recast
from tests.helpers import assert_close
from tests.lowering.test_onnx_decoder import exported, greedy, ids, made

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
LLAMA = Path(__file__).parents[2] / "benchmarks" / "models" / "llama"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's language model with weights of four bits."""
    from recast.optimizing import Request, optimize_model

    folder = tmp_path_factory.mktemp("decoders") / "llama"
    request = Request(str(LLAMA), folder, recipe="int4(group=32)", target="onnx", cache=True, genai=True)
    optimize_model(request, lambda _: None)
    return folder


def test_text_comes_out_as_it_is_made(decoder: Path, cli: Callable[..., Any]) -> None:
    found = cli("generate", decoder, "--prompt", "def main(", "-n", 12)
    assert found.status == 0, found.err
    assert found.out.startswith("def main(")
    assert found.out.endswith("\n")
    assert "12 written" in found.err
    assert "tokens/s" in found.err
    told = cli("generate", decoder, "--prompt", "def main(", "-n", 12, "--json").json
    assert len(told["ids"]) == 12
    assert found.out == "def main(" + told["text"] + "\n"
    assert told["tokens_per_second"] > 0
    by_id = cli("generate", decoder, "--ids", ",".join(map(str, told["prompt"])), "-n", 12)
    assert by_id.out.split() == [str(token) for token in told["ids"]]


def test_a_seed_decides_what_is_drawn(decoder: Path, cli: Callable[..., Any]) -> None:
    drawn = [
        cli("generate", decoder, "--ids", "316,1697,8", "-n", 12, "--temperature", 1.5, "--seed", seed, "--json").json[
            "ids"
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_four_bits_compute_what_the_rewritten_program_computes(decoder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA).float().eval()
    tokens = torch.arange(5, 5 + 2 * 40).reshape(2, 40)
    program = recast.capture(model, (), {"input_ids": tokens}, cache=True)
    rewritten = recast.rewrite(program, recast.plan(program, "int4(group=32)"), verification=False)
    from recast.patterns.capture.decoder import empty_cache

    given = (tokens, torch.ones_like(tokens), empty_cache(program.decoder or {}, 2))
    with torch.no_grad():
        wanted = rewritten(*given)["logits"][:, -1:]  # the last token's alone
    assert_close(recast.load(decoder)(*given)["logits"], wanted, terms=6 * 384)


def test_files_of_the_tokenizer_and_genai_lie_beside(decoder: Path) -> None:
    assert (decoder / "tokenizer.json").read_bytes() == (LLAMA / "tokenizer.json").read_bytes()
    assert json.loads((decoder / "genai_config.json").read_text())["model"]["type"] == "llama"


def test_texts_calibrate_it_and_compare_it(decoder: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "lines.txt").write_text("def main(self):\nreturn self.name\nimport os, sys\n" * 2, encoding="utf-8")
    options = ("-r", "int4(group=32)", "--cache", "-t", "onnx", "-c", tmp_path / "lines.txt")
    made_ = cli("optimize", LLAMA, "-o", tmp_path / "fitted", *options, "--json")
    assert made_.status == 0, made_.err
    assert all(site["measured_error"] is not None for site in made_.json["sites"])
    rows = cli("compare", decoder, tmp_path / "fitted", "--on", tmp_path / "lines.txt", "--rounds", 1, "--json").json[
        "rows"
    ]
    assert [row.get("error") for row in rows] == [None, None]


def test_a_model_without_tokenizer_takes_ids(tmp_path: Path, cli: Callable[..., Any]) -> None:
    exported("Llama").save(tmp_path / "out")
    prompt = ids(5).tolist()
    found = cli("generate", tmp_path / "out", "--ids", ",".join(map(str, prompt)), "-n", 6)
    assert [int(token) for token in found.out.split()] == greedy(made("Llama"), prompt, 6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "x " * 600], "the model has 256 positions"),
        ([], "either --prompt"),
        (["--prompt", "x", "--ids", "1"], "either --prompt"),
        (["--ids", "1,two"], "are no token ids"),
        (["--ids", "1,9999"], "holds token 9999"),
        (["--ids", "1", "--top-p", "2"], "top_p is 2.0"),
    ],
)
def test_what_cannot_be_generated_is_one_message(
    decoder: Path, cli: Callable[..., Any], arguments: list[str], told: str
) -> None:
    found = cli("generate", decoder, *arguments)
    assert found.status == 2
    assert told in found.err
    assert "Traceback" not in found.err


def test_folders_that_cannot_generate_are_refused(
    decoder: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = recast.capture(torch.nn.Linear(4, 4).eval(), (torch.randn(3, 4),))
    recast.lower(program, target="onnx").save(tmp_path / "plain")
    found = cli("generate", tmp_path / "plain", "--ids", "1")
    assert (found.status, "has no key-value cache" in found.err) == (2, True)
    found = cli("generate", tmp_path / "nothing", "--ids", "1")
    assert (found.status, "holds no recast.json" in found.err) == (2, True)
    shutil.copytree(decoder, tmp_path / "cut")
    model = tmp_path / "cut" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-100])
    found = cli("generate", tmp_path / "cut", "--ids", "1")
    assert (found.status, "is damaged" in found.err) == (2, True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = cli("generate", decoder, "--ids", "1")
    assert (found.status, "onnxruntime cannot be imported" in found.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--genai", "-t", "onnx"], "goes with --cache"),
        (["--genai", "--cache", "-t", "eager"], "of the target onnx"),
        (["--accuracy-level", "4"], "of the target onnx"),
        (["--embeddings", "int4(group=32)"], "of the target onnx"),
        (["--embeddings", "int3", "-t", "onnx"], "2, 4 or 8 bits"),
        (["--accuracy-level", "3", "-t", "onnx"], "accuracy_level is 3"),
        (["--style", "qdq"], "of the target onnx"),
        (["--style", "qd", "-t", "onnx"], "'qoperator' or 'qdq'"),
        (["--cache-type", "int8", "-t", "onnx"], "goes with --cache"),
        (["--cache-type", "int4", "--cache", "-t", "onnx"], "'float' or 'int8'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, cli: Callable[..., Any], arguments: list[str], told: str
) -> None:
    found = cli("optimize", LLAMA, "-o", tmp_path / "out", *arguments)
    assert found.status == 2
    assert told in found.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_decoder_is_refused(tiny: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    found = cli("optimize", tiny, "--cache", "-t", "onnx", "-o", tmp_path / "out")
    assert found.status == 2
    assert "no causal language model" in found.err
