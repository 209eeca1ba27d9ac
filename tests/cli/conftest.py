import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recast.cli import run

MODULE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(32, 64)
        self.down = torch.nn.Linear(64, 32)
        self.scale = torch.nn.Parameter(torch.ones(32))

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return self.down(hidden) * self.scale + torch.softmax(x @ x.transpose(-1, -2), -1) @ x


def make():
    return Net().eval(), (torch.randn(2, 5, 32),)


def keyword():
    return Net().eval(), (), {"x": torch.randn(2, 5, 32)}


def other():
    torch.manual_seed(1)
    net = Net().eval()
    net.up = torch.nn.Linear(32, 64)
    return net, (torch.randn(2, 5, 32),)


def training():
    return Net(), (torch.randn(2, 5, 32),)


def nonfinite():
    net = Net().eval()
    net.down.weight.data[3, 4] = float("nan")
    return net, (torch.randn(2, 5, 32),)


class Layered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
        self.head = torch.nn.Linear(32, 50)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def layered():
    return Layered().eval(), (torch.randn(2, 5, 32),)


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def untraceable():
    return Branching().eval(), (torch.randn(2, 5, 32),)


def broken():
    raise ZeroDivisionError("on purpose")


def wrong():
    return Net()


number = 3
"""


@dataclasses.dataclass
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run a command in this process, as `main` does but for the exit; wide, so that nothing is folded."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        status = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Path]:
    """A current directory with a module of models and data for them."""
    (tmp_path / "little.py").write_text(MODULE, encoding="utf-8")
    torch.manual_seed(0)
    save_file({"x": torch.randn(12, 5, 32)}, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("little", None)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "cache"  # shared by a worker's tests
    monkeypatch.setenv("RECAST_CACHE", os.fspath(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: BERT of two layers with a word-level tokenizer, saved as safetensors."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "tree", "graph", "is", "walked", "matrix", "."]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
