"""Calibration: the statistics are what an oracle gathers, in one pass, kept on disk, and for one model only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.calibrate import Calibration
from recast.patterns.errors import CalibrationError
from recast.patterns.program import Program
from tests.helpers import assert_close


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.down = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.back = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.q(x).relu() * self.k(x)
        h = self.down(h) + self.down(h * 2)
        y = torch.einsum("bti,eio->beto", h, self.experts)
        y = torch.matmul(h.flatten(0, 1)[None].expand(3, -1, -1), self.experts).sum(0) + 0 * y.sum()
        return self.back @ y.t() if scale is None else self.back @ y.t() * scale


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return recast.capture(Model().eval(), (torch.randn(2, 5, 12),))


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, t, 12, generator=generator) for n, t in ((2, 5), (1, 1), (3, 4))]


@pytest.fixture(scope="module")
def calibration(program: Program, batches: list[Tensor]) -> Calibration:
    return recast.calibrate(program, batches, sample=8)


def weight(program: Program, name: str) -> Tensor:
    return program.weights[name].detach().double()


def seen_by(program: Program, batch: Tensor) -> dict[str, Tensor]:
    """What flows into each site, computed by hand in float64."""
    x = batch.double().flatten(0, 1)
    q, k = (x @ weight(program, f"{n}.weight").T + weight(program, f"{n}.bias") for n in "qk")
    h = q.relu() * k
    w, b = weight(program, "down.weight"), weight(program, "down.bias")
    down = (h @ w.T + b) + (2 * h @ w.T + b)
    y = (down[None] @ weight(program, "experts")).sum(0)
    return {"q": x, "k": x, "down": torch.cat([h, 2 * h]), "experts.1": down, "back": y}


@pytest.mark.parametrize("site", ["q", "k", "down", "experts.1", "back"])
def test_statistics_equal_the_oracle(
    program: Program, batches: list[Tensor], calibration: Calibration, site: str
) -> None:
    vectors = torch.cat([seen_by(program, b)[site] for b in batches])
    stats = calibration[site]
    assert stats.gram is not None
    assert stats.gram.dtype is torch.float64
    # The vectors are float32, each a sum of a few dozen products, and so is what is gathered from them.
    assert_close(stats.gram.float(), vectors.T @ vectors, terms=36 * len(vectors))
    assert_close(stats.mean.float(), vectors.mean(0), terms=36)
    assert_close(stats.absmax.float(), vectors.abs().amax(0), terms=36)
    assert stats.tokens == len(vectors)
    assert stats.sample is not None
    assert len(stats.sample) <= 8
    nearest = vectors[(stats.sample.double()[:, None] - vectors).norm(dim=-1).argmin(1)]
    assert_close(stats.sample, nearest, terms=36)  # the sample is of the vectors that were seen


def test_gram_in_float64_is_exact_for_raw_inputs(batches: list[Tensor], calibration: Calibration) -> None:
    x = torch.cat([b.double().flatten(0, 1) for b in batches])
    assert calibration["q"].gram is not None
    assert_close(calibration["q"].gram, x.T @ x, terms=len(x))


def test_sites_that_read_the_same_share_statistics(calibration: Calibration) -> None:
    assert calibration.members["q"] == calibration.members["k"]
    assert calibration["q"] is calibration["k"]
    assert "nowhere" not in calibration


def test_streaming_equals_one_batch(program: Program) -> None:
    whole = torch.randn(6, 5, 12)
    one, many = (
        recast.calibrate(program, [whole]),
        recast.calibrate(program, (whole[i : i + 2] for i in range(0, 6, 2))),
    )
    for site in ("q", "down", "back"):
        a, b = one[site], many[site]
        assert a.gram is not None
        assert_close(a.gram.float(), b.gram, terms=36 * a.tokens)  # products of other shapes add up in another order
        assert_close(a.mean.float(), b.mean, terms=36)
        assert a.tokens == b.tokens


def test_batches_of_every_kind(program: Program, batches: list[Tensor]) -> None:
    for kind in (batches[:1], [(batches[0],)], [{"x": batches[0]}], iter([[batches[0]]])):
        assert recast.calibrate(program, kind, progress=False).hash == recast.calibrate(program, batches[:1]).hash


def test_saved_and_loaded(program: Program, calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    calibration.save(file)
    loaded = Calibration.load(file)
    assert loaded.hash == calibration.hash
    assert (loaded.members, loaded.weights, loaded.tokens) == (
        calibration.members,
        calibration.weights,
        calibration.tokens,
    )
    assert torch.equal(loaded.probe[0], calibration.probe[0])
    loaded.check(program)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_a_foreign_model_is_refused(program: Program, calibration: Calibration) -> None:
    other = program.copy()
    other.module.q.weight = nn.Parameter(program.weights["q.weight"] + 1e-3)
    with pytest.raises(CalibrationError, match=r"these statistics belong to model \w{16}, this is model"):
        calibration.check(other)
    with pytest.raises(CalibrationError, match="calibrate this model"):
        recast.plan(other, "int8", calibration)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch was given; a handful of real inputs would do"),
        ([torch.full((1, 2, 12), torch.nan)], "batch 0 holds NaN or infinite values"),
        ([torch.randn(1, 2, 12), torch.full((1, 2, 12), torch.inf)], "batch 1 holds NaN or infinite values"),
        ([torch.full((1, 2, 12), 1e30)], "what flows into .* is not finite"),
        ([torch.zeros(0, 2, 12)], r"batch 0 is empty \(shape \(0, 2, 12\)\)"),
        ([torch.randn(1, 2, 13)], "batch 0 does not fit the program: input 'x' was captured as"),
        ([torch.randn(1, 2, 12).double()], "batch 0 does not fit the program"),
        ([{"y": torch.randn(1, 2, 12)}], r"batch 0 does not fit the program: .*not given: \['x'\]"),
        ([3], "batch 0 does not fit the program"),
        ([(torch.randn(1, 2, 12),) * 9], "batch 0 does not fit the program"),
    ],
)
def test_useless_data_is_refused(program: Program, batches: list[Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        recast.calibrate(program, batches)


@pytest.mark.parametrize("content", [b"", b"no tensors here", None])
def test_unreadable_files(tmp_path: Path, content: bytes | None, calibration: Calibration) -> None:
    file = tmp_path / "statistics"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"cannot be read.*gather it again"):
        Calibration.load(file)


def test_a_cut_file_and_one_of_another_kind(tmp_path: Path, calibration: Calibration) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "statistics"
    calibration.save(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(file)
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(CalibrationError, match="is not a calibration file"):
        Calibration.load(file)
    save_file({"x": torch.zeros(2)}, file, metadata={"format": "recast-calibration-1"})
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(file)


def test_importances_are_squared_gradients(program: Program, batches: list[Tensor], tmp_path: Path) -> None:
    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return (output * batch.mean()).square().sum()

    calibration = recast.calibrate(program, batches, loss=loss)
    torch.manual_seed(0)
    model = Model().eval()
    assert torch.equal(model.down.weight, program.weights["down.weight"])
    squares: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        torch.autograd.backward(loss(model(batch), batch))
        gradients = {
            "q": model.q.weight.grad,
            "down": model.down.weight.grad,  # used twice
            "experts.1": None if model.experts.grad is None else model.experts.grad[1].T,
            "back": model.back.grad,
        }
        for name, gradient in gradients.items():
            assert gradient is not None
            squares[name] = squares.get(name, torch.zeros(())) + gradient.double().square() / len(batches)
    assert set(calibration.importance) >= {*squares, "k"}
    for name, square in squares.items():
        stats = calibration[name]
        assert stats.row_importance is not None
        assert stats.column_importance is not None
        assert_close(stats.row_importance.float(), square.sum(1).float(), terms=10**4)
        assert_close(stats.column_importance.float(), square.sum(0).float(), terms=10**4)
    # Sites that share their inputs have importances of their own.
    assert calibration.members["q"] == calibration.members["k"]
    assert calibration["q"].hash != calibration["k"].hash
    assert all(p.grad is None for p in program.module.parameters())
    plain = recast.calibrate(program, batches)
    assert plain["q"].row_importance is None
    assert plain.hash != calibration.hash
    calibration.save(tmp_path / "with.safetensors")
    again = Calibration.load(tmp_path / "with.safetensors")
    assert again.hash == calibration.hash
    plan = recast.plan(program, {"rules": [{"match": "q", "form": "fwsvd(3)"}], "allow_larger": True}, again)
    assert str(plan.entries["q"].form) == "fwsvd(rank=3)"
    with pytest.raises(CalibrationError, match=r"importances .* are needed.*loss=\.\.\."):
        recast.plan(program, {"rules": [{"match": "q", "form": "fwsvd(3)"}]}, plain)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda output, batch: 1.0, "the loss gave a float; a scalar tensor"),
        (lambda output, batch: output, "the loss gave a tensor"),
        (lambda output, batch: batch.sum(), "does not depend on the weights"),
        (lambda output, batch: output.sum() * torch.inf, "gradient of the loss at .* is not finite"),
    ],
)
def test_a_loss_that_is_none_is_refused(program: Program, batches: list[Tensor], loss: Any, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        recast.calibrate(program, batches, loss=loss)


def test_a_loss_that_does_not_reach_a_weight_is_said(program: Program, batches: list[Tensor]) -> None:
    with pytest.warns(RuntimeWarning, match=r"no gradient of the loss reaches .*q"):
        calibration = recast.calibrate(program, batches, loss=lambda output, batch: output.sum() * 0)
    rows = calibration["q"].row_importance
    assert rows is not None
    assert not bool(rows.any())
    plan = recast.plan(program, {"rules": [{"match": "q", "form": "fwsvd(3)"}], "allow_larger": True}, calibration)
    assert plan.entries["q"].predicted_error is not None
