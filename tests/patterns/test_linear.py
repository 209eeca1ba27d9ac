"""Every spelling of a product with a constant matrix is found, raised exactly, and rewritten as its operator says."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import recast
from recast.passes.base import Context
from recast.passes.cache import OperatorCache
from recast.passes.module import OperatorModule
from recast.passes.plan import Entry, Plan
from recast.passes.rules.raise_sites import RaiseSites
from recast.patterns.constants import Constants
from recast.patterns.linear.find import find_linear, matrix_of
from recast.patterns.program import Interface, Program, set_by_path
from recast.patterns.sites import LinearSite, Mismatch
from tests.helpers import assert_close

B, S, I, O = 2, 4, 63, 60  # noqa: E741  # sequence as long as there are heads (4), odd features
Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A way to write a product.

    Attributes
    ----------
    shape
        Of the weight.
    run
        The product, from the inputs, the weight, and a bias of O values.
    matrix
        What must be found: from the weight, the matrix (out, in), or a stack of them for a batched weight.
    """

    shape: tuple[int, ...]
    run: Callable[[Inputs, Tensor, Tensor], Tensor]
    matrix: Callable[[Tensor], Tensor]
    batched: bool = False
    uses: int = 1


def same(w: Tensor) -> Tensor:
    return w


def turned(w: Tensor) -> Tensor:
    return w.t()


SPELLINGS = {
    "linear": Spelling((O, I), lambda x, w, b: F.linear(x["x"], w), same),
    "linear with bias": Spelling((O, I), lambda x, w, b: F.linear(x["x"], w, b), same),
    "linear, then bias": Spelling((O, I), lambda x, w, b: F.linear(x["x"], w) + b, same),
    "linear of a vector": Spelling((O, I), lambda x, w, b: F.linear(x["v"], w, b), same),
    "linear plus a computed vector": Spelling((O, I), lambda x, w, b: F.linear(x["x"], w, x["v"][:O].exp()), same),
    "mm": Spelling((I, O), lambda x, w, b: x["m"].mm(w), turned),
    "mm from the left": Spelling((O, I), lambda x, w, b: w.mm(x["m"].t()), same),
    "mm and add": Spelling((I, O), lambda x, w, b: b + x["m"].mm(w), turned),
    "mv": Spelling((O, I), lambda x, w, b: w.mv(x["v"]), same),
    "matmul": Spelling((I, O), lambda x, w, b: x["x"] @ w, turned),
    "matmul and add": Spelling((I, O), lambda x, w, b: x["x"] @ w + b, turned),
    "matmul from the left": Spelling((O, I), lambda x, w, b: w @ x["x"].transpose(1, 2), same),
    "matmul of a vector": Spelling((I, O), lambda x, w, b: x["v"] @ w, turned),
    "matmul to a vector": Spelling((O, I), lambda x, w, b: w @ x["v"], same),
    "matmul of a vector with stacked weights": Spelling(
        (3, I, O), lambda x, w, b: x["v"] @ w, lambda w: w.transpose(1, 2).reshape(3 * O, I)
    ),
    "matmul with more weights than inputs": Spelling(
        (3, I, O), lambda x, w, b: x["m"] @ w, lambda w: w.transpose(1, 2).reshape(3 * O, I)
    ),
    "matmul with a batch of one": Spelling((1, I, O), lambda x, w, b: x["x"] @ w, lambda w: w[0].t()),
    "transposed weight": Spelling((O, I), lambda x, w, b: x["x"] @ w.t(), same),
    "addmm": Spelling((I, O), lambda x, w, b: torch.addmm(b, x["m"], w), turned),
    "addmm from the left": Spelling((O, I), lambda x, w, b: torch.addmm(x["m"][:, :1].t(), w, x["m"].t()), same),
    "addmm onto a matrix": Spelling((I, O), lambda x, w, b: torch.addmm(x["m"][:, :O].sin(), x["m"], w), turned),
    "bmm": Spelling((3, I, O), lambda x, w, b: torch.bmm(x["e"], w), lambda w: w.transpose(1, 2), batched=True),
    "bmm from the left": Spelling((3, O, I), lambda x, w, b: torch.bmm(w, x["e"].transpose(1, 2)), same, batched=True),
    "baddbmm": Spelling(
        (3, I, O), lambda x, w, b: torch.baddbmm(b, x["e"], w), lambda w: w.transpose(1, 2), batched=True
    ),
    "baddbmm onto a batch": Spelling(
        (3, I, O), lambda x, w, b: torch.baddbmm(x["e"][..., :O], x["e"], w), lambda w: w.transpose(1, 2), batched=True
    ),
    "batched matmul and add": Spelling(
        (3, I, O), lambda x, w, b: x["e"] @ w + b, lambda w: w.transpose(1, 2), batched=True
    ),
    "einsum": Spelling((I, O), lambda x, w, b: torch.einsum("bsi,io->bso", x["x"], w), turned),
    "einsum with an ellipsis": Spelling((O, I), lambda x, w, b: torch.einsum("...i,oi->...o", x["x"], w), same),
    "einsum, weight first": Spelling((O, I), lambda x, w, b: torch.einsum("oi,...i->o...", w, x["x"]), same),
    "einsum without an arrow": Spelling((I, O), lambda x, w, b: torch.einsum("...i,io", x["x"], w), turned),
    "einsum to heads": Spelling(
        (I, 4, 15), lambda x, w, b: torch.einsum("bsd,dhk->bshk", x["x"], w), lambda w: w.reshape(I, O).t()
    ),
    "einsum to heads, turned": Spelling(
        (I, 4, 15), lambda x, w, b: torch.einsum("bsd,dhk->bkhs", x["x"], w), lambda w: w.permute(2, 1, 0).reshape(O, I)
    ),
    "einsum from heads": Spelling(
        (3, 21, O),
        lambda x, w, b: torch.einsum("bshk,hkd->bsd", x["x"].unflatten(2, (3, 21)), w),
        lambda w: w.reshape(I, O).t(),
    ),
    "einsum of heads that stay": Spelling(
        (3, 21, 8),
        lambda x, w, b: torch.einsum("bshk,hkd->bshd", x["x"].unflatten(2, (3, 21)), w),
        lambda w: w.transpose(1, 2),
        batched=True,
    ),
    "einsum of groups of heads": Spelling(
        (8, 3, 7, 2),
        lambda x, w, b: torch.einsum("bghk,dgkh->hbgd", x["image"][:, :42, 0, 0].unflatten(1, (3, 2, 7)), w),
        lambda w: w.permute(1, 3, 0, 2).reshape(6, 8, 7),
        batched=True,
    ),
    "1x1 conv1d": Spelling((O, I, 1), lambda x, w, b: F.conv1d(x["x"].transpose(1, 2), w, b), lambda w: w[..., 0]),
    "1x1 conv2d": Spelling((O, I, 1, 1), lambda x, w, b: F.conv2d(x["image"], w, b), lambda w: w[..., 0, 0]),
    "1x1 conv2d, same padding": Spelling(
        (O, I, 1, 1), lambda x, w, b: F.conv2d(x["image"], w, b, padding="same"), lambda w: w[..., 0, 0]
    ),
    "1x1 conv2d, unbatched": Spelling((O, I, 1, 1), lambda x, w, b: F.conv2d(x["image"][0], w), lambda w: w[..., 0, 0]),
    "1x1 conv3d": Spelling(
        (O, I, 1, 1, 1), lambda x, w, b: F.conv3d(x["image"][..., None], w, b), lambda w: w[..., 0, 0, 0]
    ),
    "through a view": Spelling((O * I,), lambda x, w, b: F.linear(x["x"], w.view(O, I)), lambda w: w.view(O, I)),
    "through two transposes": Spelling((I, O), lambda x, w, b: F.linear(x["x"], w.t().contiguous().t().t()), turned),
    "rows of a larger weight": Spelling((80, I), lambda x, w, b: F.linear(x["x"], w[:O]), lambda w: w[:O]),
    "used twice": Spelling((O, I), lambda x, w, b: F.linear(x["x"], w) + F.linear(x["x"].sin(), w, b), same, uses=2),
    "wide": Spelling((577, I), lambda x, w, b: F.linear(x["x"], w), same),
}


class Everything(nn.Module):
    """All spellings side by side, so that one capture serves all tests."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(I))

        self.weights = nn.ParameterDict({key(n): random(*s.shape) for n, s in SPELLINGS.items()})
        self.biases = nn.ParameterDict({key(n): random(O) for n in SPELLINGS})

    def forward(self, x: Inputs) -> dict[str, Tensor]:
        return {n: s.run(x, self.weights[key(n)], self.biases[key(n)]) for n, s in SPELLINGS.items()}


def key(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def inputs(batch: int = B, length: int = S, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(batch)
    shapes = {"x": (batch, length, I), "m": (7, I), "v": (I,), "e": (3, 5, I), "image": (batch, I, 3, 4)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def program() -> Program:
    return recast.capture(Everything().eval(), (inputs(),))


@pytest.fixture(scope="module")
def sites(program: Program) -> dict[str, LinearSite]:
    return {site.name: site for site in find_linear(program)[0]}


def names_of(name: str) -> list[str]:
    spelling = SPELLINGS[name]
    if not spelling.batched:
        return [f"weights.{key(name)}"]
    count = len(spelling.matrix(torch.zeros(spelling.shape)))
    return [f"weights.{key(name)}.{i}" for i in range(count)]


@pytest.mark.parametrize("name", SPELLINGS)
def test_found(program: Program, sites: dict[str, LinearSite], name: str) -> None:
    constants = Constants(program)
    expected = SPELLINGS[name].matrix(program.weights[f"weights.{key(name)}"].detach())
    for site, matrix in zip(names_of(name), expected if SPELLINGS[name].batched else [expected], strict=True):
        found = sites[site]
        assert found.shape == tuple(matrix.shape)
        assert torch.equal(matrix_of(found.uses[0], constants).read(), matrix)
        assert len(found.uses) == SPELLINGS[name].uses
        assert found.weights == (f"weights.{key(name)}",)


def test_nothing_else_is_found(program: Program, sites: dict[str, LinearSite]) -> None:
    assert set(sites) == {site for name in SPELLINGS for site in names_of(name)}
    covered = recast.coverage(program)
    assert [(m.name, m.kind, m.parameters) for m in covered.misses] == [
        ("weights.rows_of_a_larger_weight", "rest", 21 * 60)
    ]
    assert covered.parameters_total - covered.parameters_matched == 21 * 60
    assert covered.flops_matched == covered.flops_total


def test_biases_are_taken_in(sites: dict[str, LinearSite]) -> None:
    with_bias = {n for n, s in sites.items() if s.uses[-1].bias is not None}
    wanted = (
        "linear with bias", "linear, then bias", "linear of a vector", "mm and add", "matmul and add", "addmm",
        "baddbmm", "batched matmul and add", "1x1 conv1d", "1x1 conv2d", "1x1 conv2d, same padding", "1x1 conv3d",
        "used twice",
    )  # fmt: skip
    assert with_bias == {site for name in wanted for site in names_of(name)}


@pytest.mark.parametrize(("batch", "length"), [(2, 4), (1, 1), (3, 17), (4, 3)])
def test_raising_is_exact(raised_double: Program, batch: int, length: int) -> None:
    """In float64, at shapes other than the captured one, against the very operations the model was written with."""
    wide = inputs(batch, length, torch.float64)
    with torch.no_grad():
        expected = Everything().double()(wide)
        found = raised_double.run_flat(list(wide.values()))
    for result, name in zip(found, SPELLINGS, strict=True):
        assert_close(result, expected[name], terms=I)


@pytest.fixture(scope="module")
def raised_double(raised: Program) -> Program:
    copy = raised.copy()
    for name, weight in copy.weights.items():
        set_by_path(copy.module, name, nn.Parameter(weight.detach().double()))
    return copy


def everywhere(program: Program, form: str) -> Plan:
    parsed = recast.Form.parse(form)
    return Plan("", {s.name: Entry(s.name, parsed) for s in find_linear(program)[0]})


@pytest.fixture(scope="module")
def raised(program: Program) -> Program:
    return RaiseSites().run(program, Context(everywhere(program, "int8"), None, OperatorCache(None)))


def test_all_is_linear_once_raised(raised: Program) -> None:
    targets = {str(n.target) for n in raised.graph.nodes if n.op == "call_function"}
    assert not {t for t in targets if any(w in t for w in ("mm", "mv", "matmul", "einsum", "conv"))}


def test_rewriting_gives_what_the_operators_stand_for(program: Program) -> None:
    plan = everywhere(program, "int8")
    for name in list(plan.entries)[::2]:
        plan.entries[name] = Entry(name, recast.Form.parse("low_rank(ratio=0.5)"))
    result = recast.rewrite(program, plan, cache=OperatorCache(None), verification=False, pictures=False, measure=False)
    dense = {}
    for node in result.graph.find_nodes(op="call_module"):
        module = result.module.get_submodule(str(node.target))
        assert isinstance(module, OperatorModule)
        dense[module.site] = module.operator.to_dense()
    model = Everything()
    for name, spelling in SPELLINGS.items():
        weight = model.weights[key(name)].data
        places = spelling.matrix(torch.arange(weight.numel()).view(weight.shape))
        for site, place in zip(names_of(name), places if spelling.batched else [places], strict=True):
            weight.view(-1)[place.reshape(-1)] = dense[site].reshape(-1)
    given = inputs(3, 5)
    with torch.no_grad():
        expected, found = model(given), result(given)
    for name in SPELLINGS:
        assert_close(found[name], expected[name], terms=I)


# What is none, and why.


class NearMisses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "stride": (6, 8, 1, 1), "grouped": (6, 4, 1, 1), "padded": (6, 8, 1, 1), "kernel": (6, 8, 3, 3),
            "transposed": (8, 6, 1, 1), "scaled": (8, 6), "scaled_addend": (8, 6), "vector": (8,), "pair_a": (8, 6),
            "pair_b": (6, 5), "gated": (8, 8), "wide_batch": (3, 8, 6), "three": (8, 6), "three_b": (6, 5),
            "table": (9, 8), "added": (4, 8), "diagonal": (8, 8), "summed": (8, 6), "unused": (3, 3), "both": (8, 6),
        }.items():  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("cache", torch.zeros(8, 6))

    def forward(self, x: Tensor, image: Tensor, ids: Tensor) -> list[Tensor]:
        y = x @ (self.pair_a @ self.pair_b)  # a product of weights is a weight
        self.cache.add_(1)
        return [
            F.conv2d(image, self.stride, stride=2),
            F.conv2d(image, self.grouped, groups=2),
            F.conv2d(image, self.padded, padding=1),
            F.conv2d(image, self.kernel),
            F.conv_transpose2d(image, self.transposed),
            torch.addmm(x[0, :, :6], x[0], self.scaled, alpha=2),
            torch.addmm(x[0, :, :6], x[0], self.scaled_addend, beta=0.5),
            x @ self.vector,
            x @ (self.gated * x[0, 0].sigmoid()),
            x[:, None] @ self.wide_batch,
            torch.einsum("bsi,io,op->bsp", x, self.three, self.three_b),
            F.embedding(ids, self.table),
            x + self.added,
            torch.einsum("bsi,ii->bsi", x, self.diagonal),
            torch.einsum("bsi,jk->bsi", x, self.summed),
            x @ x.transpose(1, 2),
            F.scaled_dot_product_attention(x, x, x),
            torch.einsum("bsi,bti->bst", x, x),
            x @ self.cache,
            x @ self.both + F.normalize(x @ self.both.exp(), dim=-1),
            y,
        ]


@pytest.fixture(scope="module")
def near() -> Program:
    torch.manual_seed(0)
    return recast.capture(
        NearMisses().eval(), (torch.randn(2, 4, 8), torch.randn(2, 8, 5, 5), torch.zeros(2, 4, dtype=torch.int64))
    )


@pytest.fixture(scope="module")
def misses(near: Program) -> dict[str, Mismatch]:
    return {miss.name: miss for miss in recast.coverage(near).misses}


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("stride", "convolution", "a 1x1 convolution with stride [2, 2]"),
        ("grouped", "convolution", "a 1x1 convolution with groups=2"),
        ("padded", "convolution", "a 1x1 convolution with padding [1, 1]"),
        ("kernel", "convolution", "a convolution with a kernel of 3x3, not 1x1"),
        ("transposed", "other", "used by aten.conv_transpose2d.input, which is not a matrix product known here"),
        ("scaled", "product", "alpha=2 scales the product"),
        ("scaled_addend", "product", "beta=0.5 scales the product"),
        ("gated", "other", "used by aten.mul.Tensor, which is not a matrix product known here"),
        ("wide_batch", "product", "the activation is broadcast over the weight's 3 matrices"),
        ("three", "product", "einsum of 3 operands"),
        ("added", "table", "added to or joined with activations, not multiplied"),
        ("diagonal", "product", "a dimension of the weight is repeated (a diagonal, not a matrix product)"),
        ("summed", "product", "the weight is summed over its own dimension(s) jk"),
        ("cache", "buffer", "written by the model (a cache), not constant"),
    ],
)
def test_near_miss_has_its_reason(misses: dict[str, Mismatch], name: str, kind: str, reason: str) -> None:
    assert (misses[name].kind, misses[name].reason) == (kind, reason)
    assert misses[name].where.startswith("tests/patterns/test_linear.py:") or name == "cache"


def test_products_of_activations_are_misses(misses: dict[str, Mismatch]) -> None:
    computed = [m for m in misses.values() if m.reason == "both operands are computed: the weight is not constant"]
    assert len(computed) >= 2
    assert all(m.parameters == 0 and m.flops > 0 for m in computed)


def test_every_matrix_is_accounted_for_once(near: Program) -> None:
    covered = recast.coverage(near)
    matched = {w for site in covered.sites if site.kind == "linear" for w in site.weights}
    missed = [m.name for m in covered.misses if m.name in near.weights]
    matrices = {n for n, w in near.weights.items() if w.ndim > 1}
    assert matched == {"pair_a", "pair_b", "both"}
    assert len(missed) == len(set(missed))
    tables = {w for site in covered.sites if site.kind == "embedding" for w in site.weights}
    assert tables == {"table"}
    assert matched | tables | set(missed) == matrices
    assert not (matched | tables) & set(missed)


def test_coverage_numbers(near: Program) -> None:
    found = recast.coverage(near).to_dict()
    assert list(found) == ["parameters", "flops", "sites", "misses"]
    assert found["sites"] == {"linear": 3, "attention": 0, "moe": 0, "norm": 1, "embedding": 1}
    multiplied = ("stride", "grouped", "padded", "kernel", "transposed", "scaled", "scaled_addend", "gated",
                  "wide_batch", "three", "three_b", "diagonal", "summed", "both", "pair_a", "pair_b")  # fmt: skip
    total = sum(near.weights[n].numel() for n in multiplied)
    assert found["parameters"] == {"total": total, "matched": 8 * 6 * 2 + 6 * 5}
    assert set(found["misses"][0]) >= {"name", "kind", "parameters", "reason"}
    # x @ both twice, x @ (pair_a @ pair_b): two operations for each of 2 * 4 tokens
    assert found["flops"]["matched"] == 2 * 8 * (48 * 2 + 8 * 5)
    tokens, image = 2 * 4, 2 * 5 * 5
    conv = 2 * (2 * 9 * 6 * 8 + image * 6 * 4 + 2 * 49 * 6 * 8 + 2 * 9 * 6 * 8 * 9 + image * 8 * 6)
    plain = 2 * 4 * 48 * 2 + 2 * tokens * 8 + 2 * tokens * 64 + 2 * tokens * 3 * 48 + 2 * tokens * 8 * 6 * 5
    odd = 2 * tokens * 8 + 2 * tokens * 8 * 48
    activations = 2 * tokens * 4 * 8 + 2 * tokens * 4 * (8 + 8) + 2 * tokens * 4 * 8 + 2 * tokens * 48
    assert found["flops"]["total"] == found["flops"]["matched"] + conv + plain + odd + activations


def test_a_tied_embedding_is_named_and_left_dense_unless_asked() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 64)
            self.head = nn.Linear(64, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    program = recast.capture(Tied().eval(), (torch.zeros(2, 3, dtype=torch.int64),))
    (site,) = find_linear(program)[0]
    assert site.tied == ("embedding",)
    assert program.aliases == {"head.weight": "embed.weight"}
    assert recast.coverage(program).fraction == 1.0
    left = recast.plan(program, "int8", cache=OperatorCache(None))
    assert not left.entries
    assert left.skipped[0].reason.startswith("tied: embedding reads the same weight")
    plan = recast.plan(program, {"default": "int8", "tied": True}, cache=OperatorCache(None))
    result = recast.rewrite(program, plan, cache=OperatorCache(None), pictures=False)
    assert list(result.weights) == ["embed.weight"], "the lookup still reads the dense weight"
    assert plan.notes == [
        "tied: embedding still needs the dense weight of embed, which is kept beside the rewritten one"
    ]


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(60, 63).eval()
    program = recast.capture(nn.Sequential(layer).eval(), (torch.randn(2, 4, 63),))
    (site,) = find_linear(program)[0]
    assert (site.name, site.shape, site.spelling) == ("0", (60, 63), "addmm")
    assert site.uses[0].bias is not None
    result = recast.rewrite(program, everywhere(program, "dense"), cache=OperatorCache(None), pictures=False)
    x = torch.randn(3, 17, 63)
    with torch.no_grad():
        assert_close(result(x), layer(x), terms=63)


def test_a_weight_computed_in_many_steps_is_known_by_each_once() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            weight, other = self.weight, self.weight
            for _ in range(60):  # written out as one expression, 2^60 times the weight
                weight = weight * 0.5 + weight * 0.5
                other = other * 0.5 + other * 0.25
            return x @ weight.T + x @ weight.T * 2 + x @ other.T

    model = Doubled().eval()
    program = recast.capture(model, (torch.randn(3, 7),))
    sites, missed = find_linear(program)
    assert not missed
    assert sorted(len(site.uses) for site in sites) == [1, 2]
    assert_close(matrix_of(sites[0].uses[0], Constants(program)).read(), model.weight, terms=60)


def test_a_cast_weight() -> None:
    class CastWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(60, 63, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.float())

    program = recast.capture(CastWeight().eval(), (torch.randn(2, 63),))
    (site,) = find_linear(program)[0]
    assert (site.name, site.dtype) == ("weight", torch.float32)
    result = recast.rewrite(program, everywhere(program, "int8"), cache=OperatorCache(None), pictures=False)
    assert not result.weights
    assert result(torch.randn(5, 63)).dtype is torch.float32


# Random einsums, without a capture each.


def einsum_program(equation: str, x: Tensor, w: Tensor, *, weight_first: bool) -> Program:
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("w", w)
    mode = FakeTensorMode()
    given, weight = graph.placeholder("x"), graph.get_attr("w")
    given.meta["val"], weight.meta["val"] = mode.from_tensor(x), mode.from_tensor(w)
    operands = [weight, given] if weight_first else [given, weight]
    product = graph.call_function(torch.ops.aten.einsum.default, (equation, operands))
    with mode:
        product.meta["val"] = torch.einsum(equation, [n.meta["val"] for n in operands])
    graph.output((product,))
    spec = torch.utils._pytree.tree_structure(((0,), {}))
    interface = Interface(("x",), ("x",), (), spec, torch.utils._pytree.tree_structure([0]))
    return Program(fx.GraphModule(root, graph), interface)


@st.composite
def equations(draw: Any) -> tuple[str, dict[str, int], bool, bool]:
    """A contraction of x with w: some letters summed, brought by w, passing through, or shared; in any order."""
    roles = {
        r: draw(st.integers(*n)) for r, n in {"summed": (1, 2), "out": (1, 2), "free": (0, 2), "batch": (0, 2)}.items()
    }
    letters = iter("abcdefgh")
    groups = {r: [next(letters) for _ in range(n)] for r, n in roles.items()}
    x = draw(st.permutations(groups["summed"] + groups["free"] + groups["batch"]))
    w = draw(st.permutations(groups["summed"] + groups["out"] + groups["batch"]))
    y = draw(st.permutations(groups["out"] + groups["free"] + groups["batch"]))
    sizes = {d: draw(st.integers(1, 4)) for g in groups.values() for d in g}
    first = draw(st.booleans())
    terms = ("".join(w), "".join(x)) if first else ("".join(x), "".join(w))
    return f"{','.join(terms)}->{''.join(y)}", sizes, first, draw(st.booleans())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(equations())
def test_any_einsum_is_found_and_raised_exactly(case: tuple[str, dict[str, int], bool, bool]) -> None:
    equation, sizes, first, _ = case
    terms = equation.partition("->")[0].split(",")
    left, right = (torch.randn([sizes[d] for d in t], dtype=torch.float64) for t in terms)
    x, w = (right, left) if first else (left, right)
    program = einsum_program(equation, x, w, weight_first=first)
    sites, misses = find_linear(program)
    assert sites, misses
    raised = RaiseSites().run(program, Context(everywhere(program, "dense"), None, OperatorCache(None)))
    assert not raised.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    (found,) = raised.module(x)
    assert_close(found, torch.einsum(equation, left, right), terms=64)


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("bi,oi->bo", (3, 1), (4, 5)),  # the summed dimension of the input is repeated
        ("bi,oi->bo", (3, 5), (4, 1)),
        ("ei,eoi->eo", (1, 5), (3, 4, 5)),
    ],
)
def test_broadcasts_inside_a_product_are_refused(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    sites, misses = find_linear(einsum_program(equation, torch.randn(x), torch.randn(w), weight_first=False))
    assert not sites
    assert "broadcast" in misses[0].reason


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("...i,...oi->...o", (7, 3, 5), (3, 4, 5)),  # an ellipsis is aligned from the right
        ("...i,oi", (2, 3, 5), (4, 5)),
        ("a...i,i...o", (2, 3, 5), (5, 3, 4)),
    ],
)
def test_ellipsis_is_written_out_as_torch_does(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    a, b = torch.randn(x, dtype=torch.float64), torch.randn(w, dtype=torch.float64)
    program = einsum_program(equation, a, b, weight_first=False)
    raised = RaiseSites().run(program, Context(everywhere(program, "dense"), None, OperatorCache(None)))
    assert not raised.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    assert_close(raised.module(a)[0], torch.einsum(equation, a, b), terms=5)
