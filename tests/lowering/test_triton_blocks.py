"""Forms of block-diagonal factors on the triton target, the kernels interpreted where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import recast
from recast.kernels.tiles import interpreting
from recast.lowering.triton.kernels import choose
from recast.lowering.triton.serving.blocks import BLOCKS, serve
from recast.lowering.triton.serving.coupling import BLAST, COUPLING
from recast.lowering.triton.serving.low_rank import LOW_RANK
from recast.passes.forms.algebra import DirectSum, Product
from recast.passes.forms.blast import Coupling
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.permutation import Permutation, Shuffle
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {
    "block_diagonal(blocks=3)": f"{BLOCKS} + bias",
    "permuted_block_diagonal(blocks=3)": f"{BLOCKS} + bias",
    "permutation @ block_diagonal(blocks=3)": f"{BLOCKS} + bias",
    "monarch(blocks=4)": f"{BLOCKS} + bias",
    "monarch(blocks=4, rank=1)": f"{BLOCKS} + bias",
    "block_shuffle": f"{BLOCKS} + bias",
    "block_dense": f"aten + {BLOCKS}",
    "blast(blocks=4, rank=6, iterations=3)": f"{BLAST} + bias",
    "block_diagonal(blocks=4) + low_rank(rank=3)": f"{BLOCKS} + {LOW_RANK} + sum + bias",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_numbers(form: str, dtype: torch.dtype) -> None:
    model = nn.Linear(60, 60 if "permutation @" in form else 48).eval().to(DEVICE, dtype)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE, dtype=dtype),))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}))
    artifact = recast.lower(rewritten, "triton")
    assert [row.kernel for row in artifact.report.rows] == [FORMS[form]]
    for tokens in (1, 7):
        x = torch.randn(tokens, 60, device=DEVICE, dtype=dtype)
        assert_close(artifact(x), rewritten(x), terms=60)


def random(b: int, p: int, q: int) -> BlockDiagonal:
    return BlockDiagonal(torch.randn(b, p, q, device=DEVICE))


def order(count: int) -> Permutation:
    return Permutation(torch.randperm(count, dtype=torch.int32, device=DEVICE))


OPERATORS = {
    "blocks": lambda: random(3, 5, 7),
    "a shuffle before": lambda: Product(random(4, 3, 15), Shuffle(15, 4)),
    # The grids need not be those of the blocks.
    "a shuffle of cells before": lambda: Product(random(4, 3, 15), Shuffle(2, 6, width=5)),
    "a shuffle after": lambda: Product(Shuffle(3, 4), random(2, 6, 5)),
    "permutations around": lambda: Product(order(12), Product(random(3, 4, 2), order(6))),
    "the other way round": lambda: Product(Product(order(12), random(3, 4, 2)), order(6)),
    "three": lambda: Product(random(2, 3, 6), Product(Product(Shuffle(4, 3), random(4, 3, 2)), random(2, 4, 3))),
    "two between": lambda: Product(random(2, 3, 6), Product(Shuffle(4, 3), Product(order(12), random(4, 3, 2)))),
    "ragged": lambda: DirectSum((random(3, 5, 7), random(1, 2, 3))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_are_served_whole(name: str) -> None:
    operator = OPERATORS[name]()
    packed = serve(operator)
    assert packed is not None
    assert packed.kernel == BLOCKS
    for tokens in ((1,), (2, 3)):
        x = torch.randn(*tokens, operator.shape[1], device=DEVICE)
        assert_close(packed.apply(x), operator.apply(x), terms=20)


@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        (Shuffle(3, 4), "aten"),
        (Product(order(12), order(12)), "aten"),
        (Product(order(12), Product(order(12), random(3, 4, 2))), f"aten + {BLOCKS}"),
        (Product(Dense(torch.randn(5, 12, device=DEVICE)), random(3, 4, 2)), f"aten + {BLOCKS}"),
        (random(3, 4, 2).to(torch.float64), "aten (blocks of float64: no kernel)"),
        (Coupling(torch.randn(2, 3, 4, device=DEVICE)), COUPLING),
        (Coupling(torch.randn(2, 3, 4, device=DEVICE)).to(torch.float64), "aten (coupling in float64: no kernel)"),
        # Blocks that are not the coupling's groups.
        (
            Product(random(4, 5, 6), Product(Coupling(torch.randn(3, 2, 8, device=DEVICE)), random(4, 4, 2))),
            f"{BLOCKS} + {COUPLING}",
        ),
        (DirectSum((random(3, 4, 2), Dense(torch.randn(5, 4, device=DEVICE)))), "aten"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operators_that_are_not(operator: Operator, kernel: str) -> None:
    name, packed, emit = choose(operator)
    assert name == kernel
    x = torch.randn(3, operator.shape[1], device=DEVICE, dtype=operator.dtype)
    assert_close(emit(packed, x), operator.apply(x), terms=20)


@pytest.mark.parametrize("brackets", ["left", "right"])
def test_groups_of_blast_begin_where_sixteen_bytes_are_loaded(brackets: str) -> None:
    left, right = random(3, 4, 5), random(2, 5, 7)
    coupling = Coupling(torch.randn(3, 2, 5, device=DEVICE))
    operator = (
        Product(Product(left, coupling), right) if brackets == "left" else Product(left, Product(coupling, right))
    )
    kernel, packed, emit = choose(operator)
    assert kernel == BLAST
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.tensors().items()}
    assert shapes == {"left": (3, 4, 16), "weights": (3, 2, 16), "right": (2, 16, 16)}
    for tokens in (1, 17):
        x = torch.randn(tokens, 14, device=DEVICE)
        assert_close(emit(packed, x), operator.apply(x), terms=14)


def test_rows_begin_where_sixteen_bytes_are_loaded() -> None:
    packed = serve(random(3, 5, 7))
    assert packed is not None
    assert packed.held["0.blocks"].shape == (3, 5, 16)
    blocks = random(3, 5, 32)
    kept = serve(blocks)
    assert kept is not None
    assert kept.held["0.blocks"].data_ptr() == blocks.blocks.data_ptr()


def test_saved_and_loaded(tmp_path: Path) -> None:
    assert interpreting() or DEVICE == "cuda"
    model = nn.Sequential(nn.Linear(60, 48), nn.ReLU(), nn.Linear(48, 36, bias=False)).eval().to(DEVICE)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE),))
    recipe = {"rules": [{"match": "0", "form": "monarch"}, {"match": "2", "form": "permuted_block_diagonal(blocks=3)"}]}
    artifact = recast.lower(recast.rewrite(program, recast.plan(program, recipe)), "triton")
    artifact.save(tmp_path / "saved")
    x = torch.randn(5, 60, device=DEVICE)
    assert torch.equal(recast.load(tmp_path / "saved")(x), artifact(x))
