"""Drift of layers is what an oracle finds that runs the modules themselves; models without layers or logits are refused."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.drift import divergence
from recast.patterns.errors import CalibrationError
from tests.helpers import assert_close
from tests.passes.drift_models import WIDTH, Encoder, Model, batches_of, made


def told_apart(model: Model, batches: list[Tensor]) -> np.ndarray:
    """The same in numpy: what the modules leave behind, averaged, through norm and head written out."""

    def array(value: Any) -> np.ndarray:
        found: np.ndarray = value.detach().numpy()
        return found

    total = np.zeros(len(model.layers) - 1)
    for ids in batches:
        told = []
        for hidden in model.hidden(ids):
            x = array(hidden).reshape(-1, WIDTH).mean(0)
            x = (x - x.mean()) / np.sqrt(x.var() + model.norm.eps) * array(model.norm.weight) + array(model.norm.bias)
            if model.kind == "transform":
                x = array(nn.functional.gelu(torch.from_numpy(array(model.dense.weight) @ x + array(model.dense.bias))))
            x = array(model.head.weight) @ x + (array(model.head.bias) if model.head.bias is not None else 0)
            x = np.tanh(x / 0.5) * 0.5 if model.kind == "soft cap" else x
            told.append(np.exp(x) / np.exp(x).sum())
        total += [float((p * np.log(p / q)).sum()) for p, q in itertools.pairwise(told)]
    return total / len(batches)


KINDS = [
    "plain",
    "soft cap",
    "transform",
    "last token",
    "some tokens",
    "pooled",
    "last that counts",
    "hidden states",
    "bias of all",
    "additions outside",
    "encoder",
    "weights alone",
]


FIXED = ["plain", "last token", "some tokens", "pooled", "encoder"]


@pytest.mark.parametrize(
    ("kind", "static"),
    [pytest.param(kind, False, id=kind) for kind in KINDS]
    + [pytest.param(kind, True, id=f"{kind}, fixed sizes") for kind in FIXED],
)
def test_drift_is_that_of_the_modules_run_one_by_one(kind: str, static: bool) -> None:
    model = made(kind)
    example = torch.randint(1, 50, (2, 5))
    program = recast.capture(model, (example,), dynamic_shapes={"ids": None} if static else None)
    batches = batches_of((2, 5), (2, 5)) if static else batches_of((3, 4), (1, 7), (2, 5))
    found = recast.calibrate(program, batches, drift=True).drift
    assert list(found) == ["layers.0", "layers.1", "layers.2"]
    assert_close(
        torch.tensor(list(found.values()), dtype=torch.float64), torch.tensor(told_apart(model, batches)), terms=2000
    )


def test_divergence_is_none_of_equal_distributions_and_that_of_the_formula_else() -> None:
    one, other = torch.randn(3, 9), torch.randn(3, 9)
    assert torch.equal(divergence(one, one), torch.zeros(3, dtype=torch.float64))
    p, q = (np.exp(x.double().numpy()) for x in (one, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert_close(divergence(one, other), torch.tensor((p * np.log(p / q)).sum(1)), terms=9)
    assert_close(divergence(one + 5, other - 2), divergence(one, other), terms=9, factor=1e9)  # float32 sums


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "hidden",
            r"no output of \w+ is what a last linear gives \(aten.layer_norm.default in 'body.norm'\); a model of",
        ),
        ("pooler", "no output of Encoder is what a last linear gives"),
        ("layers alone", "no output of Encoder is what a last linear gives"),
        ("no layers", "no modules that differ in a number"),
        ("of other sizes", "'narrow': what 'narrow.0' gives does not go on as one value, of the shape"),
        ("every layer", r"'body.layers': what 'body.layers.0' gives does not go on as one value"),
    ],
)
def test_models_without_layers_in_a_row_or_logits_are_refused(kind: str, message: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (2, 5))
    program = recast.capture(Encoder(kind).eval(), (ids,))
    with pytest.raises(CalibrationError, match=message) as caught:
        recast.calibrate(program, [ids], drift=True)
    assert "across='layers'" in str(caught.value)
    assert recast.calibrate(program, [ids]).drift == {}


def test_logits_that_are_not_finite_are_refused() -> None:
    model = made().float()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    ids = torch.randint(1, 50, (2, 5))
    program = recast.capture(model, (ids,), check=False)
    with pytest.raises(
        CalibrationError, match=r"the drift after layers.0 is not finite in this batch; check the batch"
    ):
        recast.calibrate(program, [ids], drift=True)
