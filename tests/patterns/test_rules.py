"""Rules of other packages, and what is asked of programs: faults are named, refusals are told."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.explaining import explain
from recast.passes.base import Pipeline
from recast.patterns import plugins
from recast.patterns.errors import ModelError, PlanError, RecastError
from recast.patterns.language import Any_, Call
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.rules import GROUP, Rule, rules
from recast.patterns.sites import Site
from tests.helpers import assert_close

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Squash(Site):
    kind: ClassVar[str] = "squash"


PATTERN = Call.of(aten.tanh.default, Any_("x"), name="tanh")


def rule(build: Any, **settings: Any) -> Rule:
    return Rule("squash", "squash", PATTERN, build, **settings)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.mask = nn.Buffer(torch.ones(9, 9).tril())

    def forward(self, x: Tensor) -> Tensor:
        seen = self.mask[: x.shape[1], : x.shape[1]] == 0
        scores = (x @ x.mT).masked_fill(seen, 0.0)
        return torch.tanh(self.up(x)) + scores.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def program() -> Program:
    return recast.capture(Model().eval(), (torch.randn(2, 4, 6),))


def raises(match: Any, around: Any) -> str:
    raise KeyError("my bug")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (raises, r"rule 'squash' \(.*test_rules\): build raised KeyError: 'my bug'; repair"),
        (lambda match, around: None, r"rule 'squash' \(.*\): build gives None; a Site is needed"),
        (lambda match, around: 3, r"build gives 3; a Site is needed, or a sentence"),
    ],
)
def test_a_faulty_build_is_named(program: Program, made: Any, message: str) -> None:
    with pytest.raises(RecastError, match=message):
        recognise(program, only=[rule(made)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suspicious": (aten.tanh.default,)}, "suspicious is .*; a function of a node"),
        ({"anchors": aten.tanh.default}, "anchors is .*; a frozenset of operations"),
    ],
)
def test_a_rule_of_wrong_parts_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecastError, match=message):
        rule(lambda match, around: Squash(match.root.name, ()), **settings)


@pytest.mark.parametrize("anchors", [frozenset(), frozenset({aten.tanh.default})], ids=["no anchors", "anchors"])
def test_a_sentence_of_build_is_told(program: Program, anchors: frozenset[Any]) -> None:
    found = recognise(program, only=[rule(lambda match, around: "it is too small", anchors=anchors)])
    told = [m for m in found.misses if m.kind == "squash"]
    assert [(m.name, m.reason) for m in told] == [("tanh", "nearest pattern 'squash': it is too small")]
    assert "test_rules.py" in told[0].where


class _Entry:
    name, value = "theirs", "their_package:rule"

    def __init__(self, offered: Any) -> None:
        self.offered = offered

    def load(self) -> Any:
        if isinstance(self.offered, Exception):
            raise self.offered
        return self.offered


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def offered(thing: Any) -> None:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Entry(thing)] if group == GROUP else [])
        rules.cache_clear()
        plugins._entries.cache_clear()

    yield offered
    rules.cache_clear()
    plugins._entries.cache_clear()


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (3, "entry point 'theirs' (their_package:rule) offers 3; a Rule or several are needed"),
        ([3], "offers 3; a Rule or several are needed"),
        (ImportError("no such module"), "'theirs' (their_package:rule) of another package failed to load: ImportError: no such"),
    ],
)  # fmt: skip
def test_a_faulty_entry_point_is_named(offer: Any, thing: Any, message: str) -> None:
    offer(thing)
    with pytest.raises(RecastError, match=re.escape(message)):
        rules()


def test_a_rule_of_another_package_takes_part(offer: Any, program: Program) -> None:
    offer(rule(lambda match, around: Squash(match.root.name, ())))
    assert [site.name for site in recast.find(program, "squash")] == ["tanh"]


def test_what_is_asked_wrongly(program: Program) -> None:
    with pytest.raises(RecastError, match="there is no kind of site 'atention'; did you mean 'attention'"):
        recast.find(program, "atention")
    for ask in (recast.find, recast.coverage):
        with pytest.raises(ModelError, match=r"a Program is needed, Model was given; recast\.capture"):
            ask(Model())  # type: ignore[arg-type]


def test_a_mask_is_no_matrix(program: Program) -> None:
    covered = recast.coverage(program)
    assert (covered.parameters_matched, covered.parameters_total) == (36, 36)
    (mask,) = [m for m in covered.misses if m.name == "mask"]
    assert mask.kind == "table"
    assert "masked_fill" in mask.reason


def test_any_value_of_the_graph_is_explained(program: Program) -> None:
    assert explain(program, "x")["text"].startswith("a value of the graph, an input, of shape ")
    found = explain(program, "tanh")
    assert found["what"] == "value"
    assert "made by tanh" in found["text"]
    assert "part of no site" in found["text"]
    assert explain(program, "linear")["part_of"] == ["linear up"]


def test_a_mask_to_be_added_is_as_long_as_the_sequence() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x @ x.mT + mask).softmax(-1) @ x

    model = Masked().eval()
    captured = recast.capture(model, (torch.randn(2, 6, 8), torch.zeros(2, 6, 6)))
    assert captured.notes == []
    given = (torch.randn(3, 9, 8), torch.randn(3, 9, 9))
    assert_close(captured(*given), model(*given), terms=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_linears{most=4", "a brace is left open in 'merge_linears{most=4'"),
        (["merge_linears"], "text is needed, such as 'raise_sites,apply_forms', list was given"),
    ],
)
def test_a_pipeline_that_cannot_be_read(text: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Pipeline.parse(text)
