"""Dictionaries and shared atoms on the triton target, the kernels interpreted where there is no GPU."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.lowering.inline import inline_operators
from recast.lowering.triton.kernels import choice, choose
from recast.lowering.triton.serving import atoms
from recast.lowering.triton.serving.atoms import ATOMS
from recast.lowering.triton.serving.blocks import BLOCKS
from recast.lowering.triton.serving.dequantizing import DEQUANTIZING
from recast.lowering.triton.serving.dictionary import DICTIONARY
from recast.lowering.triton.serving.low_rank import LOW_RANK
from recast.passes.forms.operator import Operator
from recast.passes.forms.shared_atoms import Atoms
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODED = "shared_atoms(2, across='all') | int4(group=16)"


def close(operator: Operator, packed: Operator, *, dtype: torch.dtype) -> None:
    for tokens in ((1,), (2, 3)):
        x = torch.randn(*tokens, operator.shape[1], device=DEVICE, dtype=dtype)
        assert_close(packed.apply(x), operator.apply(x), terms=4 * operator.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("sparse_dictionary(atoms=20, nonzeros=7, iterations=2)", DICTIONARY),
        ("sparse_dictionary(atoms=20, nonzeros=7, iterations=2) | int8", DEQUANTIZING),
    ],
)
def test_dictionary(form: str, kernel: str, dtype: torch.dtype) -> None:
    operator = recast.Form.parse(form).fit(torch.randn(33, 60, device=DEVICE)).to(dtype)
    name, packed, _ = choose(operator)
    assert name == kernel if kernel == DICTIONARY else kernel in name
    close(operator, packed, dtype=dtype)


def test_dictionary_in_float64_has_none() -> None:
    operator = recast.Form.parse("sparse_dictionary(atoms=5, iterations=1)").fit(torch.randn(9, 8).double().to(DEVICE))
    name, packed, _ = choose(operator)
    assert name == "aten (dictionary in float64: no kernel)"
    close(operator, packed, dtype=torch.float64)


def test_dictionary_passes_gradients() -> None:
    operator = recast.Form.parse("sparse_dictionary(atoms=6, iterations=1)").fit(torch.randn(9, 8, device=DEVICE))
    _, packed, _ = choose(operator)
    tensors = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in packed.tensors().items()}
    held = packed.with_tensors(tensors)
    x, out = torch.randn(3, 8, device=DEVICE), torch.randn(3, 9, device=DEVICE)
    to_values, to_dictionary = torch.autograd.grad(held.apply(x), [tensors["values"], tensors["dictionary"]], out)
    wide = {
        name: t.double().requires_grad_(t.is_floating_point())
        for name, t in operator.tensors().items()
        if t.is_floating_point()
    }
    plain = operator.with_tensors({**operator.tensors(), **wide})
    right = torch.autograd.grad(
        plain.apply(x.double()), [wide["left.values.weight"], wide["right.weight"]], out.double()
    )
    assert_close(to_dictionary, right[1], terms=9)
    # The kernel's order is another one: the same numbers, between two zeros.
    assert_close(to_values[1:-1].sort().values, right[0].flatten().sort().values, terms=9)


def program_of(form: str, dtype: torch.dtype = torch.float32) -> recast.Program:
    layers = (nn.Linear(60, 60, bias=i == 1) for i in range(3))
    model = nn.Sequential(*layers).eval().to(DEVICE, dtype)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE, dtype=dtype),))
    return recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}))


def buffers(program: recast.Program, name: str) -> list[Tensor]:
    return [t for path, t in program.module.named_buffers() if path.endswith(f".{name}")]


def test_atoms_in_codes_are_held_once() -> None:
    rewritten = program_of(CODED)
    inlined, kernels = inline_operators(rewritten, choose)
    assert list(kernels.values()) == [ATOMS] * 3
    for name in ("values", "scale"):
        held = buffers(inlined, name)
        assert len(held) == 3
        assert len({t.untyped_storage().data_ptr() for t in held}) == 1
    assert len({t.untyped_storage().data_ptr() for t in buffers(inlined, "coefficients")}) == 3
    x = torch.randn(5, 60, device=DEVICE)
    assert_close(inlined(x), rewritten(x), terms=60 * 6)
    # Nothing is kept of what no program holds.
    del inlined
    gc.collect()
    assert not atoms._made


@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("shared_atoms(3, across='all') | int4(group=32)", ATOMS),
        ("shared_atoms(2, across='all') | nf4(group=16)", ATOMS),
        ("shared_atoms(2, 3, across='all') | int4(group=16)", f"{ATOMS} + {DEQUANTIZING}"),
        ("shared_atoms(2, 3, across='all')", LOW_RANK),
        ("shared_atoms(2, across='all')", "keep_dense=True writes the sum out once"),
        ("shared_atoms(1, across='all') | fp8", ATOMS),
        ("shared_atoms(2, across='all') | int4(group=20)", "groups of 20 are no multiple of 16"),
        ("shared_atoms(1, across='all') | block_diagonal(3)", "no codes of one kind, no kernel"),
    ],
)
def test_kernels_of_atoms(form: str, kernel: str) -> None:
    weights = [torch.randn(33, 60, device=DEVICE).bfloat16() for _ in range(4)]
    operator = recast.Form.parse(form).fit_together(weights, [None] * 4)[1]
    name, packed, _ = choose(operator)
    assert kernel in name
    close(operator, packed, dtype=torch.bfloat16)


def test_atoms_that_are_no_codes_say_what_they_take() -> None:
    dense = torch.randn(2, 40, 50, device=DEVICE)
    operator = Atoms(torch.ones(2, device=DEVICE), tuple(map(recast.passes.forms.operator.Dense, dense)))
    assert choose(operator)[0] == (
        "aten (shared atoms: 2 of 0.016 MB in place of 0.008 MB; keep_dense=True writes the sum out once)"
    )
    name, packed, _ = choice(keep_dense=True)(operator)
    assert name == "aten (shared atoms, written out once: 0.008 MB)"
    close(operator, packed, dtype=torch.float32)


@pytest.mark.parametrize(
    ("form", "keep_dense", "kernel"),
    [
        (CODED, False, ATOMS),
        ("shared_atoms(2, across='all')", True, "aten (shared atoms, written out once: 0.0144 MB)"),
    ],
)
def test_artifacts(form: str, keep_dense: bool, kernel: str, tmp_path: Path) -> None:
    rewritten = program_of(form)
    artifact = recast.lower(rewritten, "triton", keep_dense=keep_dense)
    assert {row.kernel for row in artifact.report.rows} == {kernel}
    artifact.save(tmp_path / "saved")
    x = torch.randn(5, 60, device=DEVICE)
    assert_close(artifact(x), rewritten(x), terms=60 * 6)
    loaded = recast.load(tmp_path / "saved")
    assert_close(loaded(x), artifact(x), terms=60)


def test_blast_is_served_whole() -> None:
    rewritten = program_of("blast(blocks=4, rank=6, iterations=2)")
    _, kernels = inline_operators(rewritten, choose)
    assert set(kernels.values()) == {f"{BLOCKS} + triton coupling matmul"}
