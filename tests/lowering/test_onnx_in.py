"""ONNX in, ONNX out: transformers that others' tools wrote, read, rewritten and written again."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recast
from tests.helpers import assert_close
from tests.patterns.onnx_files import by_onnxruntime, exported

transformers = pytest.importorskip("transformers")

TEXT = ["input_ids", "attention_mask", "token_type_ids"]


def text(batch: int, words: int, names: list[str] = TEXT) -> dict[str, Tensor]:
    """Ids and masks: the second row ends halfway."""
    mask = torch.ones(batch, words, dtype=torch.int64)
    if batch > 1:
        mask[1, words // 2 + 1 :] = 0
    given = {
        "input_ids": torch.randint(0, 50, (batch, words)),
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
    }
    return {name: given[name] for name in names}


def images(batch: int, _: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


def decoder_text(batch: int, words: int) -> dict[str, Tensor]:
    return text(batch, words, TEXT[:2])


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int, int], dict[str, Tensor]]]] = {
    "bert": (bert, text),
    "vit": (vit, images),
    "llama": (llama, decoder_text),
}
WRITERS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "opset": 20},
    "dynamo23": {"dynamo": True, "opset": 23},
    "script14": {"dynamo": False, "opset": 14},  # norms and GELU spelled out
    "script17": {"dynamo": False, "opset": 17},
}
CASES = [
    ("bert", "dynamo"),
    ("bert", "script14"),
    ("bert", "fused"),
    ("vit", "dynamo23"),
    ("vit", "script17"),
    ("llama", "dynamo"),
    ("llama", "script17"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A model as one of others' tools writes it, once."""
    folder = tmp_path_factory.mktemp("onnx")

    def write(model: str, writer: str) -> Path:
        path = folder / f"{model}-{writer}.onnx"
        if path.exists():
            return path
        if writer == "fused":
            return fused(write(model, "script14"), path)
        make, inputs = MODELS[model]
        made = make()
        if writer.startswith("script"):
            made.set_attn_implementation("eager")
        return exported(made, inputs(2, 9), path, **WRITERS[writer])

    return write


def fused(source: Path, path: Path) -> Path:
    """The same after onnxruntime's transformer optimizer."""
    from onnxruntime.transformers.optimizer import optimize_model

    logging.disable(logging.WARNING)
    try:
        made = optimize_model(str(source), "bert", num_heads=4, hidden_size=32, opt_level=0)
    finally:
        logging.disable(logging.NOTSET)
    statistics = made.get_fused_operator_statistics()
    assert statistics["Attention"] == 1
    assert statistics["SkipLayerNormalization"] == 2
    made.save_model_to_file(str(path))
    return path


@pytest.mark.parametrize(("model", "writer"), CASES)
def test_the_file_read_and_written_again_gives_what_it_gave(
    model: str, writer: str, written: Callable[[str, str], Path]
) -> None:
    path = written(model, writer)
    program = recast.capture(path)
    assert program.notes == []
    dense = recast.optimize(program, recipe="dense", target="onnx")
    for shape in ((2, 9), (3, 5), (1, 12), (2, 1)):
        inputs = MODELS[model][1](*shape)
        wanted = by_onnxruntime(path, inputs)["hidden"]
        for found in (program(**inputs), dense(**inputs)):
            assert_close(found["hidden"], wanted, terms=64, factor=16)


@pytest.mark.parametrize(("model", "writer"), CASES)
def test_as_much_is_recognised_as_in_the_torch_model(
    model: str, writer: str, written: Callable[[str, str], Path]
) -> None:
    make, inputs = MODELS[model]
    of_torch = recast.coverage(recast.capture(make(), (), inputs(2, 9)))
    of_file = recast.coverage(recast.capture(written(model, writer)))
    wanted, found = of_torch.to_dict(), of_file.to_dict()
    assert found["parameters"] == wanted["parameters"]
    matrices = {s.name: s.shape for s in of_torch.sites if s.kind == "linear"}
    read = {s.name.removeprefix("model."): s.shape for s in of_file.sites if s.kind == "linear"}
    if writer == "fused":  # Q, K and V are one matrix there, of three parts
        assert read.pop("encoder.layer.0.attention.self.qkv") == (96, 32)
        packed = next(s for s in of_file.sites if s.name.endswith("qkv"))
        assert [part.name for part in packed.parts] == ["q", "k", "v"]
        matrices = {name: shape for name, shape in matrices.items() if "attention.self" not in name}
    assert read == matrices
    assert {k: found["sites"][k] for k in ("attention", "norm", "mlp")} == {
        k: wanted["sites"][k] for k in ("attention", "norm", "mlp")
    }


def test_int8_is_the_int8_of_the_torch_model(written: Callable[[str, str], Path]) -> None:
    model = bert()
    inputs = text(2, 9)
    ours = recast.optimize(model, (), inputs, recipe="int8", target="eager")
    for writer in ("dynamo", "script14"):
        read = recast.optimize(written("bert", writer), recipe="int8", target="onnx")
        assert_close(read(**inputs)["hidden"], ours(**inputs).last_hidden_state, terms=64, factor=16)


def test_what_a_mask_hides_entirely_stays_zero_without_a_test_of_every_weight(
    written: Callable[[str, str], Path],
) -> None:
    path = written("bert", "dynamo")
    artifact = recast.optimize(path, recipe="dense", target="onnx")
    kinds = [node.op_type for node in artifact.lowering._model.graph]  # type: ignore[attr-defined]
    assert "Softmax" in kinds
    assert "IsNaN" not in kinds
    inputs = text(2, 6)
    inputs["attention_mask"][1] = 0
    assert_close(artifact(**inputs)["hidden"], by_onnxruntime(path, inputs)["hidden"], terms=64, factor=16)


def test_names_and_free_sizes_are_those_of_the_file(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    import onnx

    recast.optimize(written("bert", "script17"), recipe="int8", target="onnx").save(tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [value.name for value in graph.input] == TEXT
    assert [value.name for value in graph.output] == ["hidden"]
    sizes = [[d.dim_param for d in value.type.tensor_type.shape.dim] for value in graph.input]
    assert sizes == [["batch", "sequence"]] * 3
    loaded = recast.load(tmp_path / "out")
    assert loaded(**text(3, 4))["hidden"].shape == (3, 4, 32)


@pytest.mark.slow
def test_minilm(minilm: torch.nn.Module, tmp_path: Path) -> None:
    def sample(batch: int, words: int) -> dict[str, Tensor]:
        given = text(batch, words)
        return given | {"input_ids": torch.randint(0, 30000, (batch, words))}

    for dynamo in (True, False):
        path = exported(minilm, sample(2, 9), tmp_path / f"minilm-{dynamo}.onnx", dynamo=dynamo, opset=17 + dynamo)
        artifact = recast.optimize(path, recipe="dense", target="onnx")
        assert len(recast.find(recast.capture(path), "linear")) == 36
        for shape in ((2, 9), (1, 33)):
            inputs = sample(*shape)
            wanted = by_onnxruntime(path, inputs)["hidden"]
            assert float((artifact(**inputs)["hidden"] - wanted).abs().max()) < 1e-4
