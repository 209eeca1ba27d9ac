"""Integer weights with one scale for the whole matrix, against numpy and on every target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.kernels.eight_bit_matmul import rounded_rows
from recast.passes.cache import OperatorCache
from recast.passes.forms import Form, Quantized, Stats, relative_error
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def drawn(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, n, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -1, m, dtype=torch.float64)[:, None]
    )


def fitted(text: str, weight: Tensor, stats: Stats | None = None) -> Quantized:
    operator = Form.parse(text).fit(weight, stats)
    assert isinstance(operator, Quantized)
    return operator


@pytest.mark.parametrize("shape", [(63, 60), (60, 63), (1, 37), (5, 1), (24, 48)], ids=str)
def test_codes_are_those_of_one_scale(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    w = weight.numpy()
    operator = fitted("int8(group='tensor')", weight)
    scale = np.abs(w).max() / 127
    assert operator.scale.shape == (1, 1)
    assert_close(operator.scale, torch.tensor([[scale]], dtype=torch.float64))
    assert np.array_equal(operator.values.numpy(), np.round(w / scale))
    assert_close(operator.to_dense(), torch.from_numpy(np.round(w / scale) * scale))
    # With a zero point the range is that of the whole matrix.
    operator = fitted("int8(group='tensor', symmetric=false)", weight + 0.5)
    top, bottom = max(0.0, (w + 0.5).max()), min(0.0, (w + 0.5).min())
    step = (top - bottom) / 255
    zero = np.clip(-128 - np.round(bottom / step), -128, 127)
    assert operator.zero is not None
    assert operator.zero.tolist() == [[int(zero)]]
    codes = np.clip(np.round((w + 0.5) / step) + zero, -128, 127)
    assert_close(operator.to_dense(), torch.from_numpy((codes - zero) * step))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_the_scale_is_the_best_of_those_tried(bits: int, symmetric: str) -> None:
    weight = drawn(40, 24)
    operator = fitted(f"int{bits}(group='tensor', symmetric={symmetric})", weight)
    assert operator.scale.numel() == 1
    found = float((operator.to_dense() - weight).square().sum())
    # Every clipping from a grid of its own, in numpy; the form's are eight of a coarser one.
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric == "true" else (0, 2**bits - 1)
    w = weight.numpy()
    top, bottom = (np.abs(w).max(), -np.abs(w).max()) if symmetric == "true" else (w.max(), w.min())
    errors = []
    for shrink in np.linspace(0.5, 1, 101):
        step = shrink * (top / high if symmetric == "true" else (top - bottom) / (high - low))
        zero = 0 if symmetric == "true" else np.clip(low - np.round(shrink * bottom / step), low, high)
        errors.append((((np.clip(np.round(w / step) + zero, low, high) - zero) * step - w) ** 2).sum())
    assert found >= min(errors) * (1 - 1e-9)
    assert found <= errors[-1] * (1 + 1e-6)  # no clipping at all
    assert found <= 1.6 * min(errors)


def test_storage_counts_the_scale_once() -> None:
    weight = torch.randn(64, 48)
    assert fitted("int8(group='tensor')", weight).nbytes == 64 * 48 + 4
    assert fitted("int4('tensor')", weight).nbytes == 64 * 24 + 4
    assert fitted("int4('tensor', symmetric=false)", weight).nbytes == 64 * 24 + 4 + 1
    assert str(Form.parse("int4('tensor')")) == "int4(group='tensor')"


def test_other_texts_are_refused() -> None:
    for text, works in (("int8(group='matrix')", 128), ("int4('row')", 32)):
        with pytest.raises(FormError, match=rf"group is '(matrix|row)'; a number of inputs, e.g. {works}, or 'tensor'"):
            Form.parse(text)
    with pytest.raises(FormError, match="group is 0, not positive"):
        Form.parse("int4(0)")


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "quantease"])
def test_data_never_makes_it_worse(rounding: str) -> None:
    weight = drawn(30, 40).float()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    stats = Stats.from_inputs(x * torch.logspace(0, 2, 40))
    plain = relative_error(weight, fitted("int4('tensor')", weight), stats)[1]
    aware = fitted(f"int4('tensor', rounding='{rounding}')", weight, stats)
    error = relative_error(weight, aware, stats)[1]
    assert aware.scale.shape == (1, 1)
    assert plain is not None
    assert error is not None
    assert error <= plain + 1e-7
    if rounding != "nearest":
        assert error < 0.95 * plain


FORMS = [
    "int8(group='tensor')",
    "int8(group='tensor', symmetric=false)",
    "int4(group='tensor')",
    "int4(group='tensor', symmetric=false)",
    "int3(group='tensor')",
    "int8(group='tensor', activations=true, reduce_range=true)",
    "int8(group='tensor', activations=true, per_token=false, symmetric=false)",
]


@pytest.mark.parametrize("target", ["inductor", "onnx"])
def test_on_every_target(target: str) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    # 64 inputs, so that ONNX Runtime's product of four-bit weights takes the layers; all read the same x.
    model = nn.ModuleList(nn.Linear(64, 33 + i) for i in range(len(FORMS))).eval()

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    program = recast.capture(All().eval(), (torch.randn(3, 5, 64),))
    recipe = {"rules": [{"match": f"layers.{i}", "form": form} for i, form in enumerate(FORMS)]}
    rewritten = recast.rewrite(program, recast.plan(program, recipe), cache=OperatorCache(None), measure=False)
    artifact = recast.lower(rewritten, target)
    kernels = {row.form: row.kernel for row in artifact.report.rows}
    if target == "onnx":
        assert kernels[FORMS[2]].startswith("MatMulNBits")
        assert kernels[FORMS[5]].startswith("QuantizeLinear by token")
    else:
        own = rounded_rows.unavailable() is None
        assert kernels[FORMS[5]] == ("recast int8 product (VNNI) + bias" if own else "onednn int8")
    with torch.no_grad():
        for shape in ((3, 5), (1, 1), (2, 7)):
            x = torch.randn(*shape, 64)
            for form, found, wanted in zip(FORMS, artifact(x), rewritten(x), strict=True):
                if target == "onnx" and "activations" in form:  # its bytes are unsigned, its rounding is its own
                    assert float((found - wanted).norm() / wanted.norm()) < 0.02
                else:
                    assert_close(found, wanted, terms=16 * 64)
