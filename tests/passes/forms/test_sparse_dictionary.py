"""The sparse dictionary against orthogonal matching pursuit written out, and on weights that hide one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recast.passes.forms import Form, Product, Stats, relative_error
from recast.passes.forms.dictionary_fit import pursue
from recast.passes.forms.unstructured import BitmapSparse
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def hidden(m: int, n: int, atoms: int, nonzeros: int) -> Tensor:
    codes = torch.zeros(m, atoms, dtype=torch.float64)
    for row in codes:
        row[torch.randperm(atoms)[:nonzeros]] = torch.randn(nonzeros, dtype=torch.float64)
    return codes @ torch.randn(atoms, n, dtype=torch.float64)


def test_pursuit_is_the_textbook_one() -> None:
    signals, atoms = np.random.default_rng(0).normal(size=(7, 10)), np.random.default_rng(1).normal(size=(15, 10))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes, mask = pursue(torch.from_numpy(signals), torch.from_numpy(atoms), 4)
    assert bool((mask.sum(1) == 4).all())
    for i, signal in enumerate(signals):
        chosen: list[int] = []
        rest = signal
        for _ in range(4):
            chosen.append(int(np.abs(atoms @ rest).argmax()))
            values = np.linalg.lstsq(atoms[chosen].T, signal, rcond=None)[0]
            rest = signal - values @ atoms[chosen]
        assert set(chosen) == set(mask[i].nonzero().flatten().tolist())
        assert_close(codes[i, chosen], torch.from_numpy(values), terms=10**7)


def test_many_values_are_taken_several_at_a_time() -> None:
    signals, atoms = torch.randn(5, 80, dtype=torch.float64), torch.eye(80, dtype=torch.float64)
    codes, mask = pursue(signals, atoms, 70)
    assert bool((mask.sum(1) == 70).all())
    expected = signals * (signals.abs() >= signals.abs().sort(1).values[:, 10:11])
    assert_close(codes, expected, terms=10**7)


@pytest.mark.parametrize("data", [False, True])
def test_below_low_rank_where_outputs_share_atoms(data: bool) -> None:
    torch.manual_seed(0)
    weight = hidden(300, 20, 30, 2)
    mix = torch.randn(20, 20, dtype=torch.float64) * torch.logspace(0, -1, 20, dtype=torch.float64)
    stats = Stats.from_inputs(torch.randn(200, 20, dtype=torch.float64) @ mix.T) if data else None

    def found(text: str) -> tuple[float, int]:
        operator = Form.parse(text).fit(weight, stats)
        plain, output = relative_error(weight, operator, stats)
        return (plain if output is None else output), operator.nbytes

    error, size = found("sparse_dictionary(atoms=30, nonzeros=2, iterations=20)")
    rank = -(-size // (8 * 320))
    other, larger = found(f"low_rank({rank})")
    assert size <= larger
    assert error < 0.7 * other
    # The start is the low-rank fit of as many directions as an output gets atoms.
    assert found("sparse_dictionary(atoms=12, nonzeros=4, iterations=1)")[0] <= found("low_rank(4)")[0] + 1e-9


def test_the_dictionary_is_least_squares() -> None:
    weight = torch.randn(24, 16, dtype=torch.float64)
    stats = Stats.from_inputs(torch.randn(50, 16, dtype=torch.float64))
    operator = Form.parse("sparse_dictionary(atoms=8, nonzeros=3, iterations=4)").fit(weight, stats)
    assert isinstance(operator, Product)
    assert isinstance(operator.left, BitmapSparse)
    codes = operator.left.to_dense()
    assert bool(((codes != 0).sum(1) <= 3).all())
    expected = codes.numpy() @ np.linalg.lstsq(codes.numpy(), weight.numpy(), rcond=None)[0]
    assert_close(operator.to_dense(), torch.from_numpy(expected), terms=10**5)


def test_ratio_counts_values_and_bits() -> None:
    form = Form.parse("sparse_dictionary(0.8, iterations=1)")
    operator = form.outline((1024, 512), torch.bfloat16)
    assert operator is not None
    assert 0.79 < operator.nbytes / (1024 * 512 * 2) <= 0.8
    assert Form.parse("sparse_dictionary(0.8)").outline((14336, 4096), torch.bfloat16) is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparse_dictionary", "no parameter is given"),
        ("sparse_dictionary(0.5, 8)", "given together"),
        ("sparse_dictionary(0)", "ratio is 0.0, not positive"),
        ("sparse_dictionary(atoms=8, nonzeros=0)", "nonzeros is 0, not positive"),
    ],
)
def test_parameters_are_checked(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)


def test_shapes_are_checked() -> None:
    with pytest.raises(FormError, match=r"has 8 atoms, 9 were asked of each output at a\.b; 8 or less would work"):
        Form.parse("sparse_dictionary(atoms=8, nonzeros=9)").check((16, 16), "a.b")
    with pytest.raises(FormError, match=r"keeps no atom at ratio 0.01 at a.b; ratio 0.09775 or more would work"):
        Form.parse("sparse_dictionary(0.01)").check((16, 16), "a.b")
    Form.parse("sparse_dictionary(0.09775)").check((16, 16))
