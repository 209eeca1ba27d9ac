"""Forms that another package or a script brings, finished and not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.listing import forms_by_target
from recast.passes.cache import OperatorCache
from recast.passes.forms import Cost, Dense, Form, NamedForm, Operator, Stats
from recast.patterns.errors import FormError
from tests.helpers import assert_close


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NamedForm, "_names", dict(NamedForm._names))
    monkeypatch.setattr(Operator, "_kinds", dict(Operator._kinds))


@dataclass(frozen=True, eq=False, repr=False)
class Held(Operator):
    """A matrix in a tensor of its own."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def to_dense(self) -> Tensor:
        return self.matrix

    def cost(self, tokens: int) -> Cost:
        return Cost(2 * self.matrix.numel() * tokens, self.nbytes + sum(self.shape) * tokens * self.dtype.itemsize)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["matrix"])

    def to(self, dtype: torch.dtype) -> Operator:
        return type(self)(self.matrix.to(dtype))


@dataclass(frozen=True)
class HeldForm(NamedForm):
    """What the tests below vary."""

    operator: ClassVar[type[Operator]] = Held

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        return self.operator.build({}, {"matrix": torch.empty(shape, dtype=dtype, device="meta")}, {})

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        return self.operator.build({}, {"matrix": weight.clone()}, {})


def operator(kind: str, **members: Any) -> type[Operator]:
    return dataclass(frozen=True, eq=False, repr=False)(type("Own", (Held,), {"kind": kind, **members}))


def form(name: str, **members: Any) -> type[NamedForm]:
    return dataclass(frozen=True)(type("OwnForm", (HeldForm,), {"name": name, **members}))


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_what_apply_makes_from_nothing_is_compiled() -> None:
    def reversed_twice(self: Held, x: Tensor) -> Tensor:
        places = torch.arange(self.shape[1] - 1, -1, -1, device=x.device)
        return x[..., places] @ self.matrix[:, places].T + torch.zeros(self.shape[0], dtype=x.dtype, device=x.device)

    form("own", operator=operator("own", apply=reversed_twice))
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    options: dict[str, Any] = {"recipe": {"default": "own", "allow_larger": True}}
    compiled = torch.compile(model, backend="recast", options=options)
    with torch.no_grad():
        for batch in (3, 5):
            x = torch.randn(batch, 24)
            assert_close(compiled(x), model(x), terms=24)
    assert recast.backend.reports()[-1].rows[0].kernel == "aten"


def test_a_tensor_that_only_apply_knows_is_refused_by_name() -> None:
    form("own", operator=operator("own", apply=lambda self, x: x @ self.matrix.T * torch.tensor([1.0] * self.shape[0])))
    program = recast.capture(nn.Sequential(nn.Linear(24, 16)).eval(), (torch.randn(3, 24),))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": "own", "allow_larger": True}))
    with pytest.raises(
        FormError, match=r"site '0': what runs the operator 'own' reads a tensor .* own_tensors would hold"
    ):
        recast.lower(rewritten, target="inductor")


def test_a_fit_gives_an_operator_like_the_weight() -> None:
    weight = torch.randn(6, 4)
    form("a_tensor", solve=lambda self, weight, stats: weight)
    form("turned", solve=lambda self, weight, stats: Dense(weight.T))
    form("wide", solve=lambda self, weight, stats: Dense(weight.double()))
    with pytest.raises(
        FormError, match=r"a_tensor: solve gave a Tensor at layer\.0; an Operator, such as Dense, would"
    ):
        Form.parse("a_tensor").fit(weight, where="layer.0")
    with pytest.raises(FormError, match=r"turned: solve gave an operator \(4, 6\) of torch\.float32; \(6, 4\) of"):
        Form.parse("turned").fit(weight)
    with pytest.raises(
        FormError, match=r"wide: solve gave .* torch\.float64; \(6, 4\) of torch\.float32, as the weight"
    ):
        Form.parse("wide").fit(weight)


def test_what_build_reads_has_to_be_named() -> None:
    form("unnamed", operator=operator("unnamed", own_tensors=lambda self: {}))
    held = Form.parse("unnamed").fit(torch.randn(6, 4))
    with pytest.raises(FormError, match="operator 'unnamed': build reads 'matrix', which its own_tensors, fields and"):
        held.with_tensors(held.tensors())


def test_a_form_without_dense_factors_is_not_refitted() -> None:
    form("own", operator=operator("own"))
    with pytest.raises(FormError, match=r"'own' leaves no dense factor for '\| int8' to refit; low_rank,"):
        Form.parse("own | int8").fit(torch.randn(6, 4))


def test_an_unfinished_form_says_what_it_lacks_and_leaves_the_others() -> None:
    others = {"dense": NamedForm._names["dense"]}
    cases = {
        "no_solve": (
            dataclass(frozen=True)(type("A", (NamedForm,), {"name": "no_solve"})),
            "has no examples, outline, solve",
        ),
        "no_dataclass": (
            type("B", (HeldForm,), {"name": "no_dataclass"}),
            r"@dataclass\(frozen=True\) above the class",
        ),
        "thawed": (dataclass(type("C", (NamedForm,), {"name": "thawed", **_finished()})), "is no frozen dataclass"),
        "listed": (
            form("listed", __annotations__={"sizes": list}, sizes=None),
            "has a parameter 'sizes' of type .*; bool, int, float or str would",
        ),
        "two-words": (form("two-words"), "has a name that a form's text cannot hold; letters, digits"),
    }
    for name, (kind, message) in cases.items():
        NamedForm._names.clear()
        NamedForm._names.update(others | {name: kind})
        told = rf"form '{name}' \(.*{kind.__qualname__}\) .*{message}"
        with pytest.warns(RuntimeWarning, match=told):
            assert str(Form.parse("dense")) == "dense"
        assert str(Form.parse("dense")) == "dense"  # once is enough
        if name.isidentifier():
            with pytest.raises(FormError, match=told):
                Form.parse(name)


def _finished() -> dict[str, Any]:
    return {name: HeldForm.__dict__[name] for name in ("examples", "outline", "solve")}


def test_every_missing_parameter_is_in_the_example() -> None:
    form("two", __annotations__={"a": int, "b": int})
    with pytest.raises(FormError, match=r"two: parameter 'a' is missing; two\(a=\.\.\., b=\.\.\.\) would work"):
        Form.parse("two")
    with pytest.raises(FormError, match=r"two: parameter 'b' is missing; two\(a=\.\.\., b=\.\.\.\) would work"):
        Form.parse("two(3)")


def test_one_form_that_a_target_does_not_take_leaves_the_others() -> None:
    def by_fourier(self: Held, x: Tensor) -> Tensor:
        one = torch.fft.rfft(torch.zeros_like(x)) + 1
        same: Tensor = torch.fft.irfft(torch.einsum("...k,...k->...k", torch.fft.rfft(x), one), n=self.shape[1])
        return same @ self.matrix.T

    kept = NamedForm._names["low_rank"]
    NamedForm._names.clear()
    NamedForm._names["low_rank"] = kept
    form("fourier", operator=operator("fourier", apply=by_fourier))
    rows = {row["name"]: row["targets"] for row in forms_by_target()}
    assert rows["fourier"]["onnx"].startswith("not here: target 'onnx'")
    assert rows["fourier"]["inductor"] == "aten"
    assert "MatMul" in rows["low_rank"]["onnx"]


def test_an_edited_fit_is_not_taken_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "from dataclasses import dataclass\n"
        "from recast.passes.forms import Dense\n"
        "from recast.passes.forms.dense import DenseForm\n"
        "@dataclass(frozen=True)\n"
        "class Scaled(DenseForm):\n"
        "    name = 'scaled_for_test'\n"
        "    def solve(self, weight, stats):\n"
        "        return Dense(weight * FACTOR)\n"
    )
    file = tmp_path / "scaled_for_test.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    program = recast.capture(nn.Sequential(nn.Linear(8, 8)).eval(), (torch.randn(2, 8),))
    found = []
    for factor in ("1.0", "1.0", "0.5"):
        file.write_text(text.replace("FACTOR", factor), encoding="utf-8")
        importlib.invalidate_caches()
        importlib.import_module("scaled_for_test")
        cache = OperatorCache(tmp_path / "cache")  # as another process
        plan = recast.plan(program, {"default": "scaled_for_test", "allow_larger": True}, cache=cache)
        found.append((plan.entries["0"].predicted_error, cache.fits))
        del sys.modules["scaled_for_test"]
    assert found == [(0.0, 1), (0.0, 0), (0.5, 1)]


def test_what_goes_wrong_in_a_fit_names_the_form_and_the_site() -> None:
    def failing(self: NamedForm, weight: Tensor, stats: Stats | None) -> Operator:
        raise torch.linalg.LinAlgError("not converged")

    form("breaking", solve=failing)
    with pytest.raises(
        FormError, match=r"breaking: solve failed at encoder\.q on a weight \(3, 2\).*not converged; repair"
    ):
        Form.parse("breaking").fit(torch.ones(3, 2), where="encoder.q")
