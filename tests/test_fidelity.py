"""What `benchmarks.fidelity` rests on: settings of equal bytes, perplexity, the division of the text, orders, the frontier."""

import doctest
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recast.passes.forms import Form
from recast.passes.forms.shared import divided
from tests.helpers import assert_close

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"layers.0.a": (24, 16), "layers.1.a": (24, 16), "layers.2.a": (24, 16), "layers.0.b": (16, 32)}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    # `benchmarks` is not installed, and the root of the checkout is not on the path.
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", ["fidelity_budget", "fidelity_picture", "fidelity_rows"])
def test_examples(module: Any, name: str) -> None:
    found = doctest.testmod(module(name))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    "text",
    [
        "low_rank(ratio=0.6)",
        "int3(group=8)",
        "sparse24(method='magnitude')",
        "low_rank(ratio=0.7) | int8",
        "shared_basis(ratio=0.5, group=2)",
        "shared_basis(3, group=0)",
        "shared_atoms(2, 3)",
    ],
)
def test_planned_bytes_are_those_of_the_fit(module: Any, text: str) -> None:
    forms, form = module("fidelity_budget"), Form.parse(text)
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in SHAPES.items()}
    groups = forms.groups_of(dict.fromkeys(SHAPES, form), SHAPES) or [[name] for name in SHAPES]
    held = sum(sum(divided(form.fit_together([weights[n] for n in group], [None] * len(group)))) for group in groups)
    # Bytes that several hold in common are counted in parts, each rounded up.
    assert 0 <= held - forms.planned_bytes(form, SHAPES) <= len(SHAPES) * 4


def test_largest_setting_within_the_budget(module: Any) -> None:
    forms = module("fidelity_budget")
    dense = sum(2 * m * n for m, n in SHAPES.values())
    settings = [f"low_rank({rank})" for rank in range(1, 40)]  # those above 16 do not fit these shapes
    text, size = forms.largest(settings, SHAPES, dense / 2)
    rank = int(text[len("low_rank(") : -1])
    assert size == sum(2 * rank * (m + n) for m, n in SHAPES.values()) <= dense / 2
    assert size + sum(2 * (m + n) for m, n in SHAPES.values()) > dense / 2
    assert forms.largest(settings, SHAPES, 10) is None
    assert forms.allowance(0.25, SHAPES) == dense / 4
    assert forms.allowance(text, SHAPES) == size


def test_every_family_can_be_read(module: Any) -> None:
    forms = module("fidelity_forms")
    assert len({family.name + str(family.budgets) for family in forms.FAMILIES}) == len(forms.FAMILIES)
    shapes = {f"model.layers.{i}.{kind}": (64, 64) for i in range(2) for kind in ("q", "up")}
    for family in forms.FAMILIES:
        Form.parse(family.settings[-1])
        assert family.budgets == () or len(family.settings) > 1 or family.block
    family = next(f for f in forms.FAMILIES if f.name == "low_rank")
    chosen = module("fidelity_budget").choices(family, shapes)
    assert [budget for _, budget in chosen] == list(family.budgets)
    assert chosen[0] == ("low_rank(ratio=0.875)", 0.9)  # rank 28 of 64 x 64, and the least ratio that gives it


def test_perplexity_of_known_probabilities(module: Any) -> None:
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])

    def run(ids: Tensor) -> Tensor:
        return chances.log().expand(*ids.shape, 4) + 3.0  # logits may be shifted

    judged = torch.tensor([[3, 0, 1, 2], [3, 0, 0, 0], [1, 3, 1, 1]])
    wanted = 2 ** ((1 + 2 + 3 + 1 + 1 + 1 + 3 + 2 + 2) / 9)  # the first token of a row is not guessed
    for batch in (1, 2, 3):
        assert_close(torch.tensor(module("corpus").perplexity(run, judged, batch)), torch.tensor(wanted))
    assert module("corpus").perplexity(lambda ids: torch.full((*ids.shape, 4), math.nan), judged) == math.inf


def test_corpus_is_divided_by_name(module: Any) -> None:
    corpus = module("corpus")
    names = [f"folder/file_{i}.py" for i in range(2000)]
    held = [name for name in names if corpus.is_held_out(name)]
    assert 60 < len(held) < 200
    assert held == [name for name in reversed(names) if corpus.is_held_out(name)][::-1]
    rows = corpus.windows(torch.arange(100), 10, 4)
    assert rows[:, 0].tolist() == [0, 30, 60, 90]
    assert rows[-1].tolist() == list(range(90, 100))


def test_bigrams_know_more_than_unigrams(module: Any) -> None:
    corpus = module("corpus")
    row = torch.arange(8).repeat(200)
    found = corpus.baselines(corpus.Tokens(row, row), row[:80].reshape(4, 20), 8)
    assert found["unigram"] == pytest.approx(8, rel=0.01)
    assert 1 < found["bigram"] < 2


def test_orders_are_compared(module: Any) -> None:
    orders = module("fidelity_orders")

    def row(form: str, perplexity: float, budget: float | None = None, **more: Any) -> dict[str, Any]:
        return {"model": "llama", "form": form, "budget": budget, "perplexity": perplexity, **more}

    rows = [
        row("dense", 10.0),
        row("2:4 sparsegpt", 12.0),
        row("2:4 wanda", 11.0),
        row("2:4 magnitude", 20.0),
        row("2:4 nowag", 14.0),
        row("2:4 armor", 12.0),
        *(row(name, 11.0 + i, 0.8) for i, name in enumerate(("low_rank", "asvd", "svd"))),
        {"model": "llama", "form": "fwsvd", "budget": 0.8, "failed": "no gradients"},
    ]
    found = {(entry["order"], entry["at"]): entry["holds"] for entry in orders.check_orders(rows)}
    assert found == {
        ("SparseGPT <= Wanda < magnitude at 2:4", "own"): False,
        ("ARMOR closes 40 % of the gap of NoWag-P", "own"): True,  # half of it
        ("whitened < ASVD < plain SVD", "80%"): True,
    }


def test_picture_holds_every_form(module: Any) -> None:
    import xml.etree.ElementTree as ET

    picture = module("fidelity_picture")
    rows = [{"form": "dense", "kind": "dense", "share": 1.0, "perplexity": 10.0}]
    for i, kind in enumerate(picture.PANELS):
        rows += [{"form": f"a<{i}>", "kind": kind, "share": s, "perplexity": 9 / s} for s in (0.05, 0.25, 0.5)]
    text = picture.draw(rows)
    ET.fromstring(text)
    assert all(f"a&lt;{i}&gt;" in text for i in range(4))
    assert text.count("<circle") == 4 * (3 + 1)
    assert text.count("a&lt;1&gt; ^</text>") == 1
