"""Matrices that act alike become one: clusters, what stands for a cluster, and that it is held once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.forms import Form, Stats
from tests.helpers import assert_close


class Summed(nn.Module):
    """Six linears of which 0, 2, 3 and 1, 4, 5 are nearly the same."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(36, 20) for _ in range(6))
        with torch.no_grad():
            for i, like in enumerate((0, 1, 0, 0, 1, 1)):
                self.experts[i].weight.copy_(self.experts[like].weight + 1e-3 * torch.randn(20, 36))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x * (i + 1)) for i, expert in enumerate(self.experts)]).sum(0)


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    return recast.capture(Summed().eval(), (torch.randn(3, 36),))


@pytest.mark.parametrize("features", [12, 300])  # with more than are probed, too
@pytest.mark.parametrize("data", [False, True])
def test_planted_clusters_are_found(features: int, data: bool) -> None:
    generator = torch.Generator().manual_seed(features)
    kinds = [torch.randn(9, features, generator=generator) for _ in range(3)]
    labels = [0, 1, 2, 1, 0, 2, 2, 0]
    weights = [kinds[i] + 0.05 * torch.randn(9, features, generator=generator) for i in labels]
    stats = [Stats.from_inputs(torch.randn(40, features, generator=generator)) if data else None for _ in labels]
    made = Form.parse("merged(3)").fit_together(weights, stats)
    held = [operator.tensors()["weight"].data_ptr() for operator in made]
    assert [held.index(pointer) for pointer in held] == [labels.index(label) for label in labels]


def test_what_stands_for_a_cluster_is_the_least_squares_of_all_their_data() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(7, 10, generator=generator) for _ in range(3)]
    inputs = [torch.randn(tokens, 10, generator=generator) for tokens in (300, 40, 12)]
    stats = [Stats.from_inputs(x) for x in inputs]
    made = Form.parse("merged(1)").fit_together(weights, stats)
    seen = np.concatenate([x.double().numpy() for x in inputs])
    wanted = np.concatenate([x.double().numpy() @ w.double().numpy().T for x, w in zip(inputs, weights, strict=True)])
    best = np.linalg.lstsq(seen, wanted, rcond=None)[0].T
    assert_close(made[0].to_dense(), torch.from_numpy(best).float(), terms=352, factor=16)
    # The expert that is asked most often is followed most closely.
    gaps = [float((w - made[0].to_dense()).norm()) for w in weights]
    assert gaps[0] < gaps[1] < gaps[2]


def test_inputs_that_the_data_never_shows_keep_the_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(5, 8, generator=generator) for _ in range(4)]
    x = torch.randn(60, 8, generator=generator)
    x[:, 6:] = 0
    made = Form.parse("merged(1)").fit_together(weights, [Stats.from_inputs(x)] * 4)
    mean = torch.stack(weights).mean(0)
    assert_close(made[0].to_dense(), mean, terms=60, factor=16)  # with the same data for all, seen inputs have it, too


def test_no_more_matrices_than_are_wanted_stay_as_they_are() -> None:
    weights = [torch.randn(5, 8) for _ in range(3)]
    made = Form.parse("merged(3)").fit_together(weights, [None] * 3)
    assert all(torch.equal(operator.to_dense(), weight) for operator, weight in zip(made, weights, strict=True))


@pytest.mark.parametrize("form", ["merged(2)", "merged(2) | int8"])
@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_what_is_merged_is_held_once_everywhere(
    target: str, form: str, program: recast.Program, tmp_path: Path
) -> None:
    rewritten = recast.rewrite(program, recast.plan(program, form))
    matrix = 20 * 36 * (1 if "int8" in form else 4)
    biases = 6 * 20 * 4
    scales = 2 * 20 * 4 if "int8" in form else 0
    assert 2 * matrix + biases + scales <= rewritten.report.bytes_after <= 2 * matrix + biases + scales + 12
    artifact = recast.lower(rewritten, target)
    artifact.save(tmp_path / "saved")
    loaded = recast.load(tmp_path / "saved")
    x = torch.randn(4, 36)
    with torch.no_grad():
        assert_close(artifact(x), rewritten(x), terms=36 * 6, factor=64)
        assert torch.equal(loaded(x), artifact(x))
        error = (rewritten(x) - program(x)).norm() / program(x).norm()
    assert error < (0.02 if "int8" in form else 0.01)


@pytest.mark.parametrize(("text", "message"), [("merged(0)", "count is 0"), ("merged(2, group=-1)", "negative")])
def test_bad_numbers_are_told(text: str, message: str) -> None:
    with pytest.raises(recast.RecastError, match=message):
        Form.parse(text)
