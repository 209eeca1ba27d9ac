"""Arguments of a wrong kind: one error that says what was asked, what was found, and what would work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import recast
from recast.passes.cache import OperatorCache
from recast.passes.forms.form import Form
from recast.patterns.errors import CalibrationError, PlanError, RecastError, RecipeError, WeightError
from recast.patterns.program import Program

CACHE = OperatorCache(None)
MODEL = nn.Sequential(nn.Linear(63, 60)).eval()


@pytest.fixture(scope="module")
def program() -> Program:
    return recast.capture(MODEL, (torch.randn(4, 63),))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda p: recast.calibrate(p, None), CalibrationError, "batches must be a list .* not None; a list of tensors"),
        (lambda p: recast.calibrate(p, 3), CalibrationError, "batches must be a list .* not int 3"),
        (lambda p: recast.calibrate(p, "x"), CalibrationError, "batches must be a list .* not str 'x'"),
        (lambda p: recast.calibrate(p, {"x": torch.ones(4, 63)}), CalibrationError, "not dict; in a list of one, "),
        (lambda p: recast.calibrate(MODEL, [torch.ones(4, 63)]), CalibrationError, r"a program is needed, .* recast\.capture"),
        (lambda p: recast.plan(p, "int8", "x"), CalibrationError, r"plan: calibration must be statistics, not str 'x'; recast\.cal"),
        (lambda p: recast.plan(MODEL, "int8"), PlanError, r"plan: a program is needed, not Sequential; recast\.capture"),
        (lambda p: recast.plan(p, "int8", jobs="2"), PlanError, "jobs: '2' cannot work; a whole number, 1 or more, would"),
        (lambda p: recast.plan(p, "int8", jobs=1.5), PlanError, r"jobs: 1\.5 cannot work"),
        (lambda p: recast.plan(p, "int8", jobs=True), PlanError, "jobs: True cannot work"),
        (lambda p: recast.plan(p, {"compute_dtype": ["bf16"]}), RecipeError, "compute_dtype .* is unknown"),
        (lambda p: recast.rewrite(p, "int8"), PlanError, r"rewrite: a plan is needed, not str 'int8'; recast\.plan"),
        (lambda p: recast.rewrite(p, None), PlanError, "rewrite: a plan is needed, not None"),
        (lambda p: recast.rewrite(p, recast.plan(p, "int8", cache=CACHE), calibration=3), CalibrationError, "not int 3"),
    ],
)  # fmt: skip
def test_functions(program: Program, call: Callable[[Any], Any], kind: type[RecastError], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(program)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(8, 8)


@pytest.mark.parametrize("form", ["int8", "low_rank(rank=1)", "int4(group=2) + low_rank(rank=1)"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [[1.0]], r"is a list, not a tensor; torch\.as_tensor\(weight\) would work"),
        (lambda: np.ones((8, 8)), "is a ndarray, not a tensor"),
        (lambda: None, r"is None, not a tensor; a torch tensor \(m, n\) would work"),
        (lambda: torch.eye(8).to_sparse(), r"is held as torch\.sparse_coo, .* weight\.to_dense\(\) would work"),
        (lambda: torch.empty(8, 8, device="meta"), "has a shape but no values .* would work"),
        (fake, "has a shape but no values"),
        (lambda: torch.eye(8).to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn, too coarse .* weight\.float\(\) would work"),
        (lambda: torch.eye(8).long(), r"is torch\.int64, not floating; weight\.float\(\) would work"),
        (lambda: torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8), r"is quantized .* weight\.dequantize\(\) would"),
        (lambda: torch.ones(0, 5), r"is \(0, 5\), which is empty; one row and one column or more would work"),
        (lambda: torch.ones(8), r"is \(8,\), and a weight of two dimensions \(m, n\) is needed"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights(form: str, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(WeightError, match=f"the weight at layers.3 {message}"):
        Form.parse(form).fit(make(), where="layers.3")


def test_statistics() -> None:
    with pytest.raises(CalibrationError, match=r"statistics at layers.3 must be .*Stats, not str; recast\.calibrate"):
        Form.parse("int8").fit(torch.eye(8), "x", where="layers.3")  # type: ignore[arg-type]


def test_a_program_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(63, 60)).eval()
        program = recast.capture(model, (torch.randn(4, 63),))
    with pytest.raises(WeightError, match="0 has a shape but no values"):
        recast.plan(program, "int8", cache=OperatorCache(None))
