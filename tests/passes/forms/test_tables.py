"""Forms that look values up: tables as published, bits as counted, clusters against numpy and exhaustive search."""

import itertools

import numpy as np
import pytest
import scipy.cluster.vq
import torch
from torch import Tensor

from recast.kernels.quantized_matmul.reference import unpack_codes
from recast.passes.forms import Form, Stats, relative_error
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.kmeans import cluster_values
from recast.passes.forms.levels import float_levels
from recast.passes.forms.nf4 import normal_table
from recast.passes.forms.product_quantization import cluster_vectors
from recast.patterns.errors import FormError
from tests.helpers import assert_close

# As the paper's appendix prints it.
NF4 = """
    -1 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1
"""


def test_normal_floats_are_the_published_ones() -> None:
    # Printed with seven digits, of values held in float32.
    assert_close(normal_table(4).float(), torch.tensor([float(value) for value in NF4.split()]))
    assert [len(set(normal_table(bits).tolist())) for bits in (2, 3, 4)] == [4, 8, 16]


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4), ("nf3", 3), ("nf2", 2)])
def test_double_quantized_normal_floats_take_the_bits_that_are_counted(name: str, bits: int) -> None:
    weight = torch.randn(256, 512)
    operator = Form.parse(f"{name}(double=true)").fit(weight)
    # Codes, a byte for each 64 of them, a float for each 256 bytes; and once the table and a mean.
    counted = bits + 8 / 64 + 32 / (64 * 256)
    assert round(counted, 3) == {4: 4.127, 3: 3.127, 2: 2.127}[bits]
    assert operator.nbytes == counted * weight.numel() / 8 + 4 * (2**bits + 1)
    # Coding the scales costs next to nothing.
    plain, double = (relative_error(weight, Form.parse(t).fit(weight))[0] for t in (name, f"{name}(double=true)"))
    assert plain < double * 1.001
    assert double < plain * 1.03


@pytest.mark.parametrize("form", ["nf4(group=20)", "fp4(group=20)", "fp4(group=20, kind='bitsandbytes')", "fp8"])
def test_each_value_takes_the_nearest_level(form: str) -> None:
    weight = torch.randn(5, 37, dtype=torch.float64)
    operator = Form.parse(form).fit(weight)
    assert isinstance(operator, Codebook)
    table, group = operator.table.numpy().reshape(-1), operator.group or 37
    expected = np.zeros(weight.shape)
    for start in range(0, 37, group):
        part = weight[:, start : start + group].numpy()
        scale = np.abs(part).max(1, keepdims=True)
        nearest = np.abs((part / scale)[..., None] - table).argmin(-1)
        expected[:, start : start + group] = table[nearest] * scale
    assert_close(operator.to_dense(), torch.from_numpy(expected))


def test_float_formats_are_those_of_their_bits() -> None:
    assert (6 * float_levels(2, 1)).tolist() == [*(e1 := [0, 0.5, 1, 1.5, 2, 3, 4, 6]), *(-v for v in e1)]
    for exponent, mantissa, largest, kind in ((4, 3, 480, torch.float8_e4m3fn), (5, 2, 114688, torch.float8_e5m2)):
        bytes_ = torch.arange(256, dtype=torch.uint8).view(kind).double()
        finite = torch.isfinite(bytes_)
        assert torch.equal((float_levels(exponent, mantissa) * largest)[finite], bytes_[finite])


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_codes_are_the_bytes_of_the_format(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 50)
    weight[3] = 0
    operator = Form.parse(f"fp8(kind='{kind}')").fit(weight)
    assert isinstance(operator, Codebook)
    assert operator.scale is not None
    held = operator.values.view(dtype).float()
    assert bool(torch.isfinite(held).all())
    scale = operator.scale / torch.finfo(dtype).max
    assert_close(operator.to_dense(), held * scale)
    # The conversion of torch rounds alike but for ties, and so is as far from the weight.
    converted = (weight / torch.where(scale == 0, 1, scale)).to(dtype).float() * scale
    assert float((operator.to_dense() - weight).abs().max()) <= float((converted - weight).abs().max()) * (1 + 1e-5)


def test_a_searched_bias_is_the_best_of_its_hundred() -> None:
    weight = torch.randn(4, 60, dtype=torch.float64)
    operator = Form.parse("minifloat(2, 1)").fit(weight).to_dense().numpy()
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    table = np.concatenate([table, -table])
    for row in range(4):
        w, errors = weight[row].numpy(), []
        for top in np.append(np.linspace(0.01, 1.2, 100), 1.0) * np.abs(weight[row].numpy()).max():
            errors.append(((table[np.abs((w / top)[:, None] - table).argmin(1)] * top - w) ** 2).sum())
        assert_close(torch.tensor(((operator[row] - w) ** 2).sum()), torch.tensor(min(errors)), terms=len(w))


def rounded(w: np.ndarray, top: float) -> np.ndarray:
    """Numbers at e2m1 with its largest at `top`."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    table = np.concatenate([table, -table])
    found: np.ndarray = table[np.abs((w / top)[:, None] - table).argmin(1)] * top
    return found


TOPS = np.append(np.linspace(0.01, 1.2, 100), 1.0)


@pytest.mark.parametrize("text", ["minifloat(2, 1)", "fp4(group=60, search=true)"])
def test_with_data_a_searched_bias_is_the_best_for_the_output(text: str) -> None:
    weight = torch.randn(6, 60, dtype=torch.float64)
    x = torch.randn(300, 60, dtype=torch.float64) @ torch.randn(60, 60, dtype=torch.float64)
    operator = Form.parse(text).fit(weight, Stats.from_inputs(x)).to_dense().numpy()
    gained = 0
    for row in range(6):
        w = weight[row].numpy()
        errors = [(((rounded(w, top) - w) @ x.numpy().T) ** 2).sum() for top in TOPS * np.abs(w).max()]
        found = (((operator[row] - w) @ x.numpy().T) ** 2).sum()
        assert_close(torch.tensor(found), torch.tensor(min(errors)), terms=60)
        gained += min(errors) < 0.9 * errors[-1]
    assert gained > 2


@pytest.mark.parametrize("tokens", [20, 300])
def test_no_row_loses_by_a_search(tokens: int) -> None:
    weight = torch.distributions.StudentT(4.0).sample((40, 70))
    x = torch.randn(tokens, 70, dtype=torch.float64) @ torch.randn(70, 70, dtype=torch.float64)
    weight[3], weight[4, 16:32], x[:, 5] = 0, 0, 0
    stats = Stats.from_inputs(x)

    def errors(text: str, seen: Stats | None) -> Tensor:
        gap = weight - Form.parse(text).fit(weight, seen).to_dense()
        return (gap.double() if seen is None else gap.double() @ x.T).square().sum(1)

    for name in ("fp4(group=16, {})", "minifloat(2, 1, group=16, {})", "fp4(group=16, kind='bitsandbytes', {})"):
        for seen in (None, stats):
            searched, largest = (errors(name.format(f"search={search}"), seen) for search in ("true", "false"))
            assert bool((searched <= largest * (1 + 1e-6)).all())
            assert float(searched.sum()) < (0.9 if seen is None else 0.7) * float(largest.sum())
    # Other inputs of the same kind agree that the output is what to look at.
    aware = errors("fp4(group=16, search=true)", stats).sum()
    blind = (weight - Form.parse("fp4(group=16, search=true)").fit(weight).to_dense()).double() @ x.T
    assert float(aware) < 0.9 * float(blind.square().sum())


def test_a_search_goes_with_the_roundings() -> None:
    weight = torch.distributions.StudentT(4.0).sample((40, 64))
    x = torch.randn(300, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    stats = Stats.from_inputs(x)
    for name in ("fp4(group=16, search=true, {})", "minifloat(2, 1, {})", "minifloat(2, 1, group=16, double=true, {})"):
        nearest, gptq, quantease = (
            ((weight - Form.parse(name.format(f"rounding='{how}'")).fit(weight, stats).to_dense()).double() @ x.T)
            .square()
            .sum(1)
            for how in ("nearest", "gptq", "quantease")
        )
        assert float(gptq.sum()) < 0.9 * float(nearest.sum())
        if "double" not in name:
            assert bool((gptq <= nearest * (1 + 1e-5)).all())
        assert bool((quantease <= gptq * (1 + 1e-5)).all())


def test_large_weights_try_fewer_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(30, 64)
    x = torch.randn(200, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    stats = Stats.from_inputs(x)
    all_, largest = (
        relative_error(weight, Form.parse(f"minifloat(2, 1, search={search})").fit(weight, stats), stats)[1] or 0.0
        for search in ("true", "false")
    )
    monkeypatch.setattr("recast.passes.forms.codebook._WORK", 0)
    few = relative_error(weight, Form.parse("minifloat(2, 1)").fit(weight, stats), stats)[1] or 0.0
    assert all_ < few < 0.95 * largest


def test_values_are_clustered_as_well_as_can_be() -> None:
    # In one dimension clusters are stretches of the sorted numbers: all cuts can be tried.
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(12, generator=generator, dtype=torch.float64)
        w = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
        order = torch.argsort(x)
        sorted_x, sorted_w = x[order].numpy(), w[order].numpy()

        def loss(cuts: tuple[int, ...], xs: np.ndarray = sorted_x, ws: np.ndarray = sorted_w) -> float:
            total = 0.0
            for a, b in itertools.pairwise((0, *cuts, 12)):
                mean = (ws[a:b] * xs[a:b]).sum() / ws[a:b].sum()
                total += (ws[a:b] * (xs[a:b] - mean) ** 2).sum()
            return float(total)

        best = min(loss(cuts) for cuts in itertools.combinations(range(1, 12), 2))
        centres = cluster_values(x[None], w[None], 3)[0].numpy()
        nearest = np.abs(sorted_x[:, None] - centres).argmin(1)
        found = float((sorted_w * (sorted_x - centres[nearest]) ** 2).sum())
        assert best * (1 - 1e-9) <= found <= 1.5 * best
        # No centre can be moved for the better: each is the mean of what is nearest to it.
        for k in set(nearest.tolist()):
            own = nearest == k
            assert np.isclose(centres[k], (sorted_w[own] * sorted_x[own]).sum() / sorted_w[own].sum())


@pytest.mark.parametrize("data", [False, True])
def test_many_numbers_are_counted_before_they_are_clustered(data: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(60, 577)
    weight[3], weight[:, 5] = 0, 0
    stats = Stats.from_inputs(torch.randn(300, 577) * torch.logspace(0, -2, 577)) if data else None
    form = Form.parse("kmeans(bits=3)")
    sorted_ = form.fit(weight, stats)
    monkeypatch.setattr("recast.passes.forms.kmeans._MANY", 1000)
    monkeypatch.setattr("recast.passes.forms.kmeans._SLAB", 5000)
    counted = form.fit(weight, stats)
    assert isinstance(sorted_, Codebook)
    assert isinstance(counted, Codebook)
    # A bin is a millionth of the range; a number on its other side moves a mean by less than that.
    apart = (counted.table - sorted_.table).abs().max()
    assert 0 <= apart < 1e-5 * (weight.max() - weight.min())
    assert relative_error(weight, counted)[0] < 1.0001 * relative_error(weight, sorted_)[0]
    few = torch.tensor([-3.0, 0.1, 7.0])[torch.randint(0, 3, (60, 577))]
    assert_close(form.fit(few, stats).to_dense(), few)


def test_vectors_are_clustered_no_worse_than_by_scipy() -> None:
    centres = torch.randn(8, 3, dtype=torch.float64) * 4
    vectors = centres[torch.randint(0, 8, (400,))] + 0.1 * torch.randn(400, 3, dtype=torch.float64)
    found = cluster_vectors(vectors, torch.ones_like(vectors), 8).numpy()
    _, distance = scipy.cluster.vq.vq(vectors.numpy(), found)
    theirs, _ = scipy.cluster.vq.kmeans2(vectors.numpy(), 8, minit="++", seed=0, iter=25)
    _, reference = scipy.cluster.vq.vq(vectors.numpy(), theirs)
    assert (distance**2).sum() <= (reference**2).sum() * 1.05


def test_product_quantization_takes_the_nearest_vector_and_the_bits_of_its_codes() -> None:
    weight = torch.randn(20, 26, dtype=torch.float64)
    operator = Form.parse("product_quantization(bits=5, dim=4, books=2)").fit(weight)
    assert isinstance(operator, Codebook)
    codes = unpack_codes(operator.values, 5, 7).numpy()
    padded = np.pad(weight.numpy(), ((0, 0), (0, 2))).reshape(20, 7, 4)
    seen = np.repeat([1.0], 28).reshape(7, 4)
    seen[-1, 2:] = 0  # inputs that fill up the last piece do not count
    for i, p in itertools.product(range(20), range(7)):
        table = operator.table[0, p * 2 // 7].numpy()
        distance = (seen[p] * (padded[i, p] - table) ** 2).sum(1)
        assert np.isclose(distance[codes[i, p]], distance.min())
    assert operator.nbytes == 20 * (4 + 1) + 8 * 2 * 32 * 4  # seven codes of five bits: a plane of four, one of one


def test_clusters_follow_the_inputs_that_are_large() -> None:
    weight, x = torch.randn(32, 48), torch.randn(200, 48, dtype=torch.float64) * torch.logspace(1, -1, 48)
    stats = Stats.from_inputs(x)
    # (Values of all inputs are alike here, so one table for all has little to follow.)
    for text, gain in (("kmeans(2)", 0.995), ("product_quantization(5, 4)", 0.9), ("minifloat(2, 0)", 0.9)):
        form = Form.parse(text)
        aware, free = (relative_error(weight, form.fit(weight, given), stats)[1] for given in (stats, None))
        assert aware is not None
        assert free is not None
        assert aware < gain * free


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fp4(kind='e3m0')", "'e2m1' or 'bitsandbytes' would work"),
        ("fp8(kind='e3m4')", "'e4m3' or 'e5m2' would work"),
        ("minifloat(6, 2)", "exponent=2, mantissa=1"),
        ("kmeans(9)", "1 to 8 would work"),
        ("kmeans(rows=0)", "1 would give each row a table"),
        ("product_quantization(dim=0)", "4 and 1, would work"),
    ],
)
def test_mistakes_are_told(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)


def test_shapes_that_do_not_split_are_told() -> None:
    with pytest.raises(FormError, match=r"stretches of 5 rows \(12 % 5 != 0\) at layers.0; 4 would"):
        Form.parse("kmeans(rows=5)").fit(torch.randn(12, 6), where="layers.0")
    with pytest.raises(FormError, match="fewer than 3 books; 2 would work"):
        Form.parse("product_quantization(dim=4, books=3)").fit(torch.randn(12, 6))


def test_a_damaged_codebook_is_refused() -> None:
    from recast.passes.forms import Operator

    operator = Form.parse("nf4(group=8, double=true)").fit(torch.randn(4, 16))
    config, tensors = operator.config(), operator.tensors()
    for change in ({"bits": 3}, {"group": 16}, {"shape": [4]}, {"coded_scales": "?", "scaled": False}):
        with pytest.raises(FormError):
            Operator.from_config({**config, **change}, tensors)
    with pytest.raises(FormError, match="mean"):
        Operator.from_config(config, {**tensors, "mean": tensors["mean"].expand(2)})
