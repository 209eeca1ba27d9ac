"""What is raised and what is not, block by block: the graph before, the pass, the graph after, what was found, and why not.

A block is one file under ``tests/golden/recognition``; ``pytest --accept`` writes them anew.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import recast
from recast.patterns.recognise import recognise
from tests.exact import randomise
from tests.helpers import assert_close

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "recognition"
D, HEADS = 8, 2
Run = Callable[[Any, Tensor], Any]


class Block(nn.Module):
    """Four square linears, a table for positions and a vector, and a function of them and of x."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def rms(x: Tensor, dim: int = -1) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-6)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def layer_norm(m: Any, x: Tensor) -> Any:
    h = x - x.mean(-1, keepdim=True)
    return m.weight * (h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5))


def read_twice(m: Any, x: Tensor) -> Any:
    h = rms(x)
    return m.weight * h, h


def unbiased(m: Any, x: Tensor) -> Any:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * m.weight


def rotated(x: Tensor, halves: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.linspace(0.1, 1, D // 2, dtype=x.dtype)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    return x * cos + torch.cat(halves(*x.chunk(2, -1)), -1) * sin


def attention(m: Any, x: Tensor, between: Callable[[Tensor], Tensor] = lambda s: s, dim: int = -1) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    weights = (between(q @ k.mT) / math.sqrt(D // HEADS)).softmax(dim)
    y: Tensor = m.o((weights @ v).transpose(1, 2).flatten(2))
    return y


def no_experts(m: Any, x: Tensor) -> Any:
    scores, _ = m.q(x).softmax(-1).topk(2)
    return x * scores.sum(-1, keepdim=True)


def hidden_leaves(m: Any, x: Tensor) -> Any:
    h = F.gelu(m.q(x))
    return m.k(h), h


def two_lasts(m: Any, x: Tensor) -> Any:
    h = F.gelu(m.q(x))
    return m.k(h) + m.v(h)


@dataclasses.dataclass(frozen=True)
class Case:
    """A block, the kinds found of it, and words that the reason must hold where something is missed."""

    run: Run
    found: tuple[str, ...] = ()
    missed: str = ""
    raised: bool = False


CASES = {
    "norm_rms": Case(lambda m, x: m.weight * rms(x), ("norm",), raised=True),
    "norm_layer": Case(layer_norm, ("norm",), raised=True),
    "norm_read_twice": Case(read_twice, ("norm",), raised=True),
    "norm_over_tokens": Case(lambda m, x: m.weight * rms(x, 1), missed="a norm takes the last"),
    "norm_unbiased": Case(unbiased, missed="unbiased"),
    "norm_of_another_value": Case(
        lambda m, x: m.weight * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        missed="are two values where one is needed",
    ),
    "rotary": Case(lambda m, x: rotated(x, lambda a, b: (-b, a)), ("rotary",), raised=True),
    "rotary_halves_swapped": Case(
        lambda m, x: rotated(x, lambda a, b: (-a, b)), missed="does not show the second features"
    ),
    "attention": Case(attention, ("linear",) * 4 + ("attention",), raised=True),
    "attention_over_queries": Case(lambda m, x: attention(m, x, dim=-2), ("linear",) * 4, missed="softmax"),
    "attention_another_value_off": Case(
        lambda m, x: attention(m, x, lambda s: s - s[:, :, :1]), ("linear",) * 4 + ("attention",)
    ),
    "moe_without_experts": Case(no_experts, ("linear",), missed="no linears follow from the choice"),
    "mlp": Case(lambda m, x: m.k(F.gelu(m.q(x))), ("linear", "linear", "mlp")),
    "mlp_hidden_values_leave": Case(hidden_leaves, ("linear", "linear"), missed="used outside of the block too"),
    "mlp_two_last_linears": Case(two_lasts, ("linear",) * 3, missed="a block has one last linear"),
    "linear_scaled": Case(
        lambda m, x: torch.addmm(x[0], x[1], m.q.weight, alpha=2), missed="alpha=2 scales the product"
    ),
    "linear_diagonal": Case(lambda m, x: torch.einsum("bti,ii->bti", x, m.q.weight), missed="a diagonal"),
    "linear_made_of_activations": Case(lambda m, x: x @ (m.q.weight * x[0, 0].sigmoid()), missed="aten.mul.Tensor"),
}


@pytest.mark.parametrize("name", CASES)
def test_block(name: str, accept: bool) -> None:
    case = CASES[name]
    model = randomise(Block(case.run))
    before = recast.capture(model, (torch.randn(3, 5, D, dtype=torch.float64),))
    kept = str(before)
    after = recast.simplify(before, "raise_structures")  # verified
    assert str(before) == kept
    assert (str(after) != kept) == case.raised

    for batch, tokens in ((3, 2), (4, HEADS), (2, 7)):
        x = torch.randn(batch, tokens, D, dtype=torch.float64)
        with torch.no_grad():
            wanted, got = pytree.tree_leaves(model(x)), pytree.tree_leaves(after(x))
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b, terms=D * D)
    assert str(recast.simplify(after, "raise_structures")) == str(after)

    seen = recognise(before)
    assert tuple(site.kind for site in seen.sites) == case.found
    notes = [note for site in seen.sites for note in getattr(site, "notes", ())]
    missed = recast.coverage(before).misses  # those of recognition, and weights that are used otherwise
    assert {(miss.name, miss.reason) for miss in seen.misses} <= {(miss.name, miss.reason) for miss in missed}
    assert all(miss.reason and miss.where for miss in missed)
    told = [f"{miss.kind} {miss.name}: {miss.reason}" for miss in missed]
    assert not case.missed or any(case.missed in reason for reason in told)
    lines = {
        "before": kept,
        "passes": str(after.rewrites),
        "after": str(after) if case.raised else "as before",
        "found": "\n".join(f"{site.kind} {site.name}" for site in seen.sites),
        "missed": "\n".join([*told, *notes]),
    }
    text = "\n".join(f"{title}\n{_indented(body) if body else '  nothing'}\n" for title, body in lines.items())
    path = FOLDER / f"{name}.txt"
    if accept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"there is no {path.name}; run pytest --accept"
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; see what changed, or run pytest --accept"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def test_no_block_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)
