"""`recast::attention_of_heads` and its kernel for short keys: numbers, awkward shapes and masks, gradients, shapes that change."""

import pytest
import torch
from torch import Tensor

from recast.kernels.attention import short_keys
from recast.kernels.attention.attention_op import attention
from recast.kernels.attention.reference import attention_weights, by_head
from recast.lowering.inductor.compile import _import_inductor
from tests.helpers import assert_close


def test_it_runs_here():
    assert short_keys.unavailable() is None


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's definition in float64; a query without any key gets zeros."""
    added = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), added, is_causal=causal, scale=scale
    )


def heads(batch: int, count: int, length: int, depth: int, dtype: torch.dtype, seed: int) -> Tensor:
    """As projections leave them: (batch, length, count, depth), looked at as (batch, count, length, depth)."""
    made = torch.randn(batch, length, count, depth, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).transpose(1, 2)


SHAPES = [
    # batch, heads, key heads, queries, keys, depth, width
    (2, 3, 3, 63, 60, 20, 20),
    (1, 12, 12, 12, 12, 32, 32),  # as many queries as heads
    (2, 8, 2, 577, 577, 16, 48),
    (1, 4, 1, 1, 129, 64, 64),
    (3, 2, 2, 5, 1, 1, 1),
    (1, 2, 2, 130, 257, 128, 96),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(shape, dtype):
    batch, count, groups, queries, keys, depth, width = shape
    q = heads(batch, count, queries, depth, dtype, 0)
    k, v = heads(batch, groups, keys, depth, dtype, 1), heads(batch, groups, keys, width, dtype, 2)
    found = short_keys.short_keys(q, k, v, None, False, 0.3)
    assert found.dtype == dtype
    assert found.transpose(1, 2).is_contiguous()
    assert_close(found, oracle(q, k, v, None, False, 0.3), terms=keys + depth)


def masks(batch: int, count: int, queries: int, keys: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(batch, 1, 1, keys, generator=generator) > 0.3
    seen[0] = False  # a sequence that sees nothing
    added = torch.randn(1, count, queries, keys, generator=generator)
    return {
        "padding": seen,
        "spread": seen.expand(batch, count, queries, keys),
        "added": added,
        "added, turned": added.transpose(2, 3).contiguous().transpose(2, 3),
        "bfloat16": added.bfloat16(),
        "far": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[1:2],
        "infinite": torch.where(seen, 0.0, -torch.inf),
        "two axes": seen[1, 0].expand(queries, keys),
    }


@pytest.mark.parametrize("name", masks(2, 3, 5, 7))
def test_masks(name):
    q, k, v = heads(2, 3, 33, 20, torch.float32, 0), *(heads(2, 3, 70, 20, torch.float32, s) for s in (1, 2))
    mask = masks(2, 3, 33, 70)[name]
    assert_close(short_keys.short_keys(q, k, v, mask, False, 0.2), oracle(q, k, v, mask, False, 0.2), terms=90)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (9, 30), (30, 9)])
def test_causal(queries, keys):
    q, k, v = heads(1, 2, queries, 16, torch.float32, 0), *(heads(1, 2, keys, 16, torch.float32, s) for s in (1, 2))
    assert_close(short_keys.short_keys(q, k, v, None, True, 0.25), oracle(q, k, v, None, True, 0.25), terms=keys)


def test_features_that_are_not_neighbours():
    q, k, v = (torch.randn(2, 3, 16, 40).transpose(2, 3) for _ in range(3))
    assert_close(short_keys.short_keys(q, k, v, None, False, 0.25), oracle(q, k, v, None, False, 0.25), terms=56)


def test_large_scores_and_numbers_that_are_none():
    q, k, v = (heads(1, 1, 20, 16, torch.float32, s) for s in (0, 1, 2))
    assert_close(
        short_keys.short_keys(q * 1e4, k, v, None, False, 1.0), oracle(q * 1e4, k, v, None, False, 1.0), terms=36
    )
    q[0, 0, 3] = torch.nan
    found = short_keys.short_keys(q, k, v, None, False, 1.0)
    assert found[0, 0, 3].isnan().all()
    others = [i for i in range(20) if i != 3]
    assert_close(found[:, :, others], oracle(q, k, v, None, False, 1.0)[:, :, others], terms=36)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_do(queries, keys):
    q, k, v = heads(2, 3, queries, 8, torch.float32, 0), *(heads(2, 3, keys, 8, torch.float32, s) for s in (1, 2))
    for most in (0, 64):
        found = attention(q, k, v, None, False, 1.0, 1, most)
        assert torch.equal(found, torch.zeros(2, 3, queries, 8))


@pytest.mark.parametrize("most", [0, 64], ids=["torch", "own"])
def test_the_operation(most):
    q, k, v = heads(2, 4, 17, 8, torch.float32, 0), *(heads(2, 2, 19, 8, torch.float32, s) for s in (1, 2))
    given = (
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        torch.rand(2, 1, 1, 19) > 0.3,
        False,
        0.4,
        1,
        most,
    )
    torch.library.opcheck(torch.ops.recast.attention_of_heads.default, given)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    q, k, v = heads(2, 4, 17, 8, torch.float32, 0), *(heads(2, 2, 19, 8, torch.float32, s) for s in (1, 2))
    mask = None if causal else torch.rand(2, 1, 17, 19) > 0.3
    pull = torch.randn(2, 4, 17, 8)
    mine = [t.clone().requires_grad_() for t in (q, k, v)]
    theirs = [t.double().requires_grad_() for t in (q, k, v)]
    found = torch.autograd.grad(attention(*mine, mask, causal, 0.4, 1, 64), mine, pull)
    wanted = torch.autograd.grad(oracle(*theirs, mask, causal, 0.4), theirs, pull.double())
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, terms=64)


def test_the_reference():
    q, k, v = (heads(1, count, 9, 8, torch.float64, count) for count in (4, 2, 2))
    mask = torch.rand(9, 9) > 0.5
    assert_close(attention_weights(q, k, mask, False, 0.4) @ by_head(v, 4), oracle(q, k, v, mask, False, 0.4))


def test_one_graph_for_all_lengths():
    _import_inductor()  # warns on its first import
    compiled = torch.compile(lambda q, k: attention(q, k, k, None, False, 0.5, 4, 64) * 2, dynamic=True, fullgraph=True)
    for length in (3, 9, 80):
        q, k = heads(1, 2, length, 8, torch.float32, 0), heads(1, 2, length, 8, torch.float32, 1)
        assert_close(compiled(q, k), 2 * oracle(q, k, k, None, False, 0.5), terms=length)
