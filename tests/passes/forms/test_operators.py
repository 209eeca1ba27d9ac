import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recast.passes import forms as package
from recast.passes.forms import Dense, Form, NamedForm, Operator, Product, RowStack, Stats, Sum, registry
from recast.patterns import plugins
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def test_shared_storage_is_counted_once() -> None:
    packed = torch.randn(6, 4)
    rows = RowStack((Dense(packed[:2]), Dense(packed[2:])))
    assert rows.nbytes == packed.nbytes
    assert Sum((Dense(packed), Dense(packed))).nbytes == packed.nbytes
    assert Product(Dense(packed), Dense(packed.T)).nbytes == packed.nbytes
    # A view holds what it shows, not the storage behind it.
    assert Dense(packed[:2]).nbytes == 2 * 4 * 4


def test_rows_of_a_packed_weight_in_forms_of_their_own() -> None:
    packed, x = torch.randn(12, 8), torch.randn(3, 5, 8)
    parts = [Form.parse(text).fit(rows) for text, rows in zip(["dense", "int8"], packed.split([4, 8]), strict=True)]
    operator = RowStack(tuple(parts))
    assert operator.shape == (12, 8)
    assert_close(operator.apply(x), x @ torch.cat([part.to_dense() for part in parts]).T, terms=8)
    assert Operator.from_config(operator.config(), operator.tensors()).config() == operator.config()


def test_cost_counts_flops_and_traffic() -> None:
    low = Form.parse("low_rank(2)").fit(torch.randn(10, 20))
    assert low.cost(3).flops == 2 * 3 * 2 * (10 + 20)
    # Weights, x and y, and the two inner values written and read.
    assert low.cost(3).bytes == 4 * (2 * 30 + 3 * (10 + 20 + 2 * 2))
    assert Dense(torch.randn(10, 20)).cost(3).bytes == 4 * (200 + 3 * 30)


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"kind": "dnse"}, {}, "did you mean 'dense'"),
        ({"kind": "dense"}, {}, "'weight' is missing"),
        ({"kind": "dense"}, {"weight": torch.ones(3)}, "two dimensions"),
        ({"kind": "product", "children": {"left": {"kind": "dense"}}}, {"left.weight": torch.ones(2, 2)}, "'right' is"),
        ({"kind": "product", "children": 3}, {}, "must be a dictionary"),
        ({"kind": "sum", "children": {}}, {}, "at least one part"),
        ({}, {}, "with a 'kind' is needed"),
        ([], {}, "with a 'kind' is needed"),
    ],
)
def test_a_damaged_config_is_refused(config: Any, tensors: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(FormError, match=says):
        Operator.from_config(config, tensors)


def test_a_damaged_quantized_operator_is_refused() -> None:
    operator = Form.parse("int4(group=8)").fit(torch.randn(4, 16))
    config, tensors = operator.config(), operator.tensors()
    for change in ({"bits": 3}, {"group": 16}, {"dtype": "int8"}, {"dtype": "Tensor"}, {"shape": [4]}, {"shape": "x"}):
        with pytest.raises(FormError):
            Operator.from_config({**config, **change}, tensors)
    with pytest.raises(FormError, match="scale"):
        Operator.from_config(config, {**tensors, "scale": tensors["scale"][:2]})


def test_statistics_hash_and_flow() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    stats = Stats.from_inputs(x, sample=10)
    assert stats.hash == Stats.from_inputs(x.clone(), sample=10).hash
    assert stats.hash != Stats.from_inputs(x + 1e-9, sample=10).hash
    assert stats.sample is not None
    assert stats.sample.shape == (10, 6)
    operator = Dense(torch.randn(4, 6, dtype=torch.float64))
    after, direct = stats.through(operator), Stats.from_inputs(operator.apply(x))
    assert after.gram is not None
    assert direct.gram is not None
    assert_close(after.gram, direct.gram, terms=300)
    assert_close(after.mean, direct.mean, terms=300, factor=100)
    assert bool((after.absmax >= direct.absmax).all())
    assert after.tokens == 50


def test_a_file_in_the_folder_is_a_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero_for_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from recast.passes.forms.dense import DenseForm\n"
        "@dataclass(frozen=True)\n"
        "class Zero(DenseForm):\n"
        "    name = 'zero_for_test'\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_discovered", False)
    monkeypatch.setattr(NamedForm, "_names", dict(NamedForm._names))
    assert str(Form.parse("zero_for_test + int8")) == "zero_for_test + int8"
    sys.modules.pop("recast.passes.forms.zero_for_test")


def test_an_entry_point_is_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.EntryPoint("broken", "no_such_module_for_test", "recast.forms")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [found] if group == "recast.forms" else [])
    monkeypatch.setattr(registry, "_discovered", False)
    plugins._entries.cache_clear()
    with pytest.raises(FormError, match="entry point 'broken'"):
        registry.forms()
    plugins._entries.cache_clear()


def test_two_forms_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="defined by both"):
        type("Other", (NamedForm,), {"name": "int8"})
    with pytest.raises(TypeError, match="defined by both"):
        type("Other", (Operator,), {"kind": "dense"})
