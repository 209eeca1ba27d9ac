import numpy as np
import pytest
import torch

from recast.kernels.quantized_matmul import reference
from tests.helpers import assert_close


@pytest.mark.parametrize("features", [1, 2, 7, 64])
def test_packing_is_undone(features: int) -> None:
    codes = torch.randint(0, 16, (5, features), dtype=torch.uint8)
    packed = reference.pack_int4(codes)
    assert packed.shape == (5, -(-features // 2))
    assert torch.equal(reference.unpack_int4(packed, features), codes)
    assert torch.equal(packed[:, 0] & 15, codes[:, 0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("features", "group"), [(64, None), (64, 16), (63, 16), (5, 8), (1, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_are_nearest(bits: int, symmetric: bool, features: int, group: int | None, dtype: torch.dtype) -> None:
    low, high = reference.code_range(bits, symmetric)
    groups = reference.group_count(features, group)
    scale = torch.rand(6, groups, dtype=dtype) + 0.1
    zero = None if symmetric else torch.randint(low, high + 1, (6, groups)).to(torch.int8 if bits == 8 else torch.uint8)
    weight = torch.randn(6, features, dtype=dtype)
    values = reference.quantize(weight, scale, zero, bits=bits, group=group)
    dense = reference.dequantize(values, scale, zero, bits=bits, group=group, features=features)
    for row in range(6):
        for column in range(features):
            g = 0 if group is None else column // group
            s, z = scale[row, g].double().item(), 0.0 if zero is None else float(zero[row, g])
            grid = (np.arange(low, high + 1) - z) * s
            best = np.abs(grid - weight[row, column].item()).min()
            # A tie may fall either way.
            assert abs(abs(dense[row, column].item() - weight[row, column].item()) - best) <= 1e-5
    x = torch.randn(2, 3, features, dtype=dtype)
    product = reference.dequantizing_matmul(x, values, scale, zero, bits=bits, group=group)
    assert_close(product, x @ dense.T, terms=features)


@pytest.mark.parametrize("k", [1, 60, 577, 1024, 1025, 5000])
def test_integer_product_is_exact(k: int) -> None:
    a = torch.randint(-128, 128, (3, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (5, k), dtype=torch.int8)
    a[0], b[0] = -128, -128  # the largest sum there is
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    actual = reference.integer_matmul(a, b)
    assert actual.dtype == torch.int32
    assert np.array_equal(actual.numpy(), expected)
    with pytest.raises(ValueError, match="at least one feature"):
        reference.integer_matmul(a[:, :0], b[:, :0])


@pytest.mark.parametrize("group", [None, 16, 60, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_token", [True, False])
def test_dynamic_product_against_integers(
    group: int | None, symmetric: bool, dtype: torch.dtype, per_token: bool
) -> None:
    n, m = 60, 7
    groups = reference.group_count(n, group)
    scale = torch.rand(m, groups, dtype=dtype) + 0.1
    values = torch.randint(-127, 128, (m, n), dtype=torch.int8)
    zero = None if symmetric else torch.randint(-128, 128, (m, groups), dtype=torch.int8)
    x = torch.randn(4, 3, n, dtype=dtype) * torch.logspace(-6, 6, 12, dtype=dtype).reshape(4, 3, 1)
    x[0, 0] = 0
    actual = reference.dynamic_int8_matmul(x, values, scale, zero, group=group, per_token=per_token)
    # Rounding as ONNX's DynamicQuantizeLinear defines it, then integers in numpy, then the scales in float64.
    rows = x.reshape(-1, n)
    axes = (1,) if per_token else (0, 1)
    top, bottom = rows.amax(axes, keepdim=True).clamp_min(0), rows.amin(axes, keepdim=True).clamp_max(0)
    token = (top - bottom) / 255
    safe = torch.where(token == 0, 1, token)
    centre = torch.round(-bottom / safe - 128).clamp(-128, 127)
    codes = (torch.round(rows / safe) + centre).clamp(-128, 127) - centre
    integers = codes.double().numpy().astype(np.int64)
    expected = np.zeros((12, m))
    for g in range(groups):
        columns = slice(0, n) if group is None else slice(g * group, (g + 1) * group)
        offset = 0 if zero is None else zero[:, g : g + 1].numpy().astype(np.int64)
        part = integers[:, columns] @ (values[:, columns].numpy().astype(np.int64) - offset).T
        expected += part * scale[:, g].double().numpy()
    expected *= token.double().numpy()
    for row in range(12):
        assert_close(actual.reshape(12, m)[row], torch.from_numpy(expected[row]), terms=groups)
    assert not actual[0, 0].any()


def test_tokens_are_rounded_to_their_own_range() -> None:
    x = torch.tensor([[1.0, -2.0, 0.55], [0.0, 0.0, 0.0]])
    codes, scale, zero = reference.quantize_tokens(x)
    assert codes.tolist() == [[127, -128, 89], [-128, -128, -128]]
    assert zero.tolist() == [[42.0], [-128.0]]
    assert scale.shape == (2, 1)
    assert reference.quantize_tokens(x.bfloat16())[1].dtype == torch.float32
    shared = reference.quantize_tokens(x, per_token=False)
    assert shared[1].shape == shared[2].shape == (1, 1)
    assert shared[0][1].tolist() == [42, 42, 42]


def test_reduced_range_cannot_saturate_pairs() -> None:
    low, high = reference.code_range(8, True, reduce_range=True)
    assert 2 * 255 * max(-low, high) < 2**15


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bits are not supported; 2, 3, 4 or 8 would work"):
        reference.code_range(5, True)
