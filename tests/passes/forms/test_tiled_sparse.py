"""Sparse values held tile by tile, against loops over tiles in numpy; from the fit to a file and every target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.kernels.sparse_matmul import reference
from recast.passes.cache import OperatorCache
from recast.passes.forms import Dense, Form, Operator, Quantized, Stats
from recast.passes.forms.unstructured import BitmapSparse, TiledSparse
from recast.patterns.errors import FormError
from tests.helpers import assert_close

SHAPES = [(1, 1), (1, 130), (128, 64), (129, 65), (300, 7), (5, 200)]


def by_tiles(dense: np.ndarray, tile: tuple[int, int]) -> tuple[list[float], list[int], list[int]]:
    """Values, places in their tiles, and the number of values before each tile."""
    values, places, offsets = list[float](), list[int](), list[int]()
    rows, columns = dense.shape
    for row, column in itertools.product(range(0, rows, tile[0]), range(0, columns, tile[1])):
        offsets.append(len(values))
        block = dense[row : row + tile[0], column : column + tile[1]]
        for i, j in np.argwhere(block != 0):
            values.append(block[i, j])
            places.append(int(i * tile[1] + j))
    return values, places, offsets


def scattered_weight(shape: tuple[int, int], density: float = 0.2) -> Tensor:
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    weight[-1, -1] = 2.0
    if shape[0] > 4:
        weight[: shape[0] // 2, : shape[1] // 2] = 0  # tiles that hold nothing
    return weight


@pytest.mark.parametrize("tile", [(128, 64), (256, 64), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_held_tile_after_tile(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    dense = scattered_weight(shape)
    order, places, offsets = reference.tiled_pack(dense != 0, tile)
    values = dense.reshape(-1)[order]
    assert (values.tolist(), places.tolist(), offsets.tolist()) == by_tiles(dense.numpy(), tile)
    again = reference.tiled_to_dense(values, places, offsets, shape=shape, tile=tile)
    assert torch.equal(again, dense)
    assert TiledSparse(Dense(values.unsqueeze(0)), places, offsets, shape, tile).to_dense().equal(dense)


@pytest.mark.parametrize("shape", [(256, 128), (200, 70)], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.05, 0.08, 0.3])
def test_bytes_are_two_more_a_value_and_four_a_tile(shape: tuple[int, int], density: float) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    tiled, bitmap = (
        Form.parse(f"unstructured({density}, storage='{storage}')").fit(weight) for storage in ("tiled", "bitmap")
    )
    kept, tiles = shape[0] * round(density * shape[1]), -(-shape[0] // 128) * -(-shape[1] // 64)
    assert tiled.nbytes == 4 * kept + 4 * tiles
    assert torch.equal(tiled.to_dense(), bitmap.to_dense())
    # A bitmap costs as much as places of 16 bits at one value in sixteen.
    assert (tiled.nbytes < bitmap.nbytes) == (density < 1 / 16)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_storage_changes_nothing_else(method: str) -> None:
    weight, stats = torch.randn(20, 150), Stats.from_inputs(torch.randn(200, 150))
    tiled, bitmap = (
        Form.parse(f"unstructured(0.2, '{method}', storage='{storage}')").fit(weight, stats)
        for storage in ("tiled", "bitmap")
    )
    assert isinstance(tiled, TiledSparse)
    assert isinstance(bitmap, BitmapSparse)
    assert torch.equal(tiled.to_dense(), bitmap.to_dense())
    assert tiled.cost(3).flops == bitmap.cost(3).flops


def test_outliers_are_held_in_tiles_unless_asked_otherwise() -> None:
    weight = torch.randn(128, 256, dtype=torch.float16)
    tiled, bitmap = (
        Form.parse(f"quantease_outliers(storage='{storage}')").fit(weight) for storage in ("tiled", "bitmap")
    )
    assert Form.parse("quantease_outliers").fit(weight).nbytes == tiled.nbytes
    assert torch.equal(tiled.to_dense(), bitmap.to_dense())
    assert bitmap.nbytes - tiled.nbytes == 128 * 256 // 8 - 2 * 328 - 4 * 4


def test_values_are_refitted_behind_a_bar() -> None:
    weight = torch.randn(40, 100)
    for text, plain in (
        ("unstructured(0.3, storage='tiled')", "unstructured(0.3)"),
        ("quantease_outliers(0.05)", "quantease_outliers(0.05, storage='bitmap')"),
    ):
        pair = [Form.parse(f"{one} | int8(group=32)").fit(weight) for one in (text, plain)]
        beside = [part for one in pair for part in (one, *one.children().values()) if hasattr(part, "values")]
        (tiled,) = (part for part in beside if isinstance(part, TiledSparse))
        assert isinstance(tiled.values, Quantized)
        exact = Form.parse(text).fit(weight).to_dense()
        assert_close(pair[0].to_dense(), exact, factor=2**16)  # half a step of 254 in 3 standard deviations
        assert not torch.equal(pair[0].to_dense(), exact)
        assert pair[0].nbytes < Form.parse(text).fit(weight).nbytes


def test_a_damaged_operator_is_refused() -> None:
    operator = Form.parse("unstructured(0.5, storage='tiled')").fit(torch.randn(4, 70))
    config, tensors = operator.config(), operator.tensors()
    for name in ("places", "offsets"):
        for changed in (tensors[name][:-1], tensors[name].float()):
            with pytest.raises(FormError, match=f"{name} are .* is needed"):
                Operator.from_config(config, {**tensors, name: changed})
        with pytest.raises(FormError, match="missing"):
            Operator.from_config(config, {key: value for key, value in tensors.items() if key != name})
    for change in ({"tile": [0, 64]}, {"tile": [1024, 64]}, {"shape": [4, 0]}, {"shape": [4]}, {"shape": [4, 700]}):
        with pytest.raises(FormError):
            Operator.from_config({**config, **change}, tensors)
    with pytest.raises(ValueError, match="values have shape"):
        TiledSparse(Dense(torch.ones(2, 140)), tensors["places"], tensors["offsets"], (4, 70))


def test_an_unknown_storage_is_told() -> None:
    with pytest.raises(FormError, match="unknown storage 'tield'; did you mean 'tiled'"):
        Form.parse("unstructured(0.5, storage='tield')")
    with pytest.raises(FormError, match="quantease_outliers: unknown storage 'csr'"):
        Form.parse("quantease_outliers(storage='csr')")


@pytest.mark.parametrize("form", ["unstructured(0.2)", "unstructured(0.2, storage='tiled')", "sparse_nm(3, 8)"])
def test_half_precision_is_written_out_for_onnx(form: str) -> None:
    pytest.importorskip("onnxruntime")
    captured = recast.capture(nn.Linear(70, 130).half().eval(), (torch.randn(3, 70).half(),))
    plan = recast.plan(captured, form)
    program = recast.rewrite(captured, plan, cache=OperatorCache(None), pictures=False, measure=False)
    x = torch.randn(7, 70).half()
    with torch.no_grad():
        assert_close(recast.lower(program, "onnx")(x), program(x), terms=70)
