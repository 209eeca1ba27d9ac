"""One token through 32 layers of the size of Llama-3-8B: weights in int4 beside bfloat16, both compiled, both in one CUDA graph.

A layer has two norms, attention over a cache with 8 of 32 heads, and a gated feed-forward network; no rotary embedding. Weights of all
layers differ, 14 GB of them in bfloat16, so that they come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_gpu_check import gap, told
from benchmarks.kernels_gpu_marks import STACK
from benchmarks.kernels_gpu_time import Clock, Turn, figures, rounds
from recast.kernels.timed import BenchCase, Prepared

# Layers, width, features between, heads, heads of keys, their size, positions of the cache.
SIZES = (32, 4096, 14336, 32, 8, 128, 512)
QUICK_SIZES = (2, 32, 32, 2, 1, 16, 8)
Linear = Callable[[str, Tensor], Tensor]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _layer(linear: Linear, x: Tensor, norms: Tensor, cache: Tensor, heads: int) -> Tensor:
    """x (1, width); norms (2, width); cache (2, heads of keys, positions, size), whose last position is written."""
    few, size = cache.shape[1], cache.shape[3]
    projected = linear("qkv", _norm(x, norms[0]))
    q, k, v = projected.split([heads * size, few * size, few * size], -1)
    cache[0, :, -1], cache[1, :, -1] = k.reshape(few, size), v.reshape(few, size)
    seen = torch.nn.functional.scaled_dot_product_attention(
        q.reshape(1, heads, 1, size), cache[0].unsqueeze(0), cache[1].unsqueeze(0), enable_gqa=True
    )
    x = x + linear("o", seen.reshape(1, heads * size))
    gate, up = linear("gate+up", _norm(x, norms[1])).chunk(2, -1)
    return x + linear("down", torch.nn.functional.silu(gate) * up)


def shapes(sizes: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's weights."""
    _, width, between, heads, few, size, _ = sizes
    return {
        "qkv": ((heads + 2 * few) * size, width),
        "o": (width, heads * size),
        "gate+up": (2 * between, width),
        "down": (width, between),
    }


def stack(case: BenchCase, clock: Clock, sizes: tuple[int, ...], count: int) -> dict[str, Any]:
    """Time both; the case is that of the packed weights. One layer is compared with its meaning too."""
    layers, width, _, heads, few, size, positions = sizes
    device, dtype = clock.device, torch.bfloat16
    packed: list[dict[str, Prepared]] = []
    dense: list[dict[str, Tensor]] = []
    for _ in range(layers):
        made = {name: case.prepare(m, n, dtype, device) for name, (m, n) in shapes(sizes).items()}
        if packed:  # what the codes mean is asked of the first layer alone, and takes memory
            made = {n: Prepared(p.held, packed[0][n].run, packed[0][n].meant, p.work) for n, p in made.items()}
        packed.append(made)
        dense.append({n: (torch.randn(s, device=device) / s[1] ** 0.5).to(dtype) for n, s in shapes(sizes).items()})
    norms = torch.ones(2, width, dtype=dtype, device=device)
    caches = torch.randn(layers, 2, few, positions, size, device=device).to(dtype)
    x = torch.randn(1, width, device=device).to(dtype)
    runs = {name: prepared.run for name, prepared in packed[0].items()}

    def in_codes(x: Tensor, held: Mapping[str, Mapping[str, Tensor]], norms: Tensor, cache: Tensor) -> Tensor:
        return _layer(lambda name, v: runs[name](held[name], v), x, norms, cache, heads)

    def in_bfloat16(x: Tensor, held: Mapping[str, Tensor], norms: Tensor, cache: Tensor) -> Tensor:
        return _layer(lambda name, v: torch.nn.functional.linear(v, held[name]), x, norms, cache, heads)

    def exact(x: Tensor, norms: Tensor, cache: Tensor) -> Tensor:
        return _layer(lambda name, v: packed[0][name].meant(packed[0][name].held, v), x, norms, cache, heads)

    mode = "max-autotune-no-cudagraphs"
    codes_layer, dense_layer = (clock.compiled(run, mode) for run in (in_codes, in_bfloat16))  # type: ignore[arg-type]
    held = [{name: prepared.held for name, prepared in made.items()} for made in packed]
    meant = exact(x.double(), norms.double(), caches[0].double())
    # A layer rounds at each of its steps, and softmax and norms spread what they are given.
    error = gap(codes_layer(x, held[0], norms, caches[0]), meant, roundings=7)  # type: ignore[call-arg,arg-type]

    def whole(layer: Any, weights: list[Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            y = x
            for weight, cache in zip(weights, caches, strict=True):
                y = layer(y, weight, norms, cache)
            return y

        return call

    turns = []
    for name, layer, weights in (("bf16", dense_layer, dense), (STACK, codes_layer, held)):
        call = whole(layer, weights)
        for _ in range(2):
            call()
        clock.wait()
        timed, how = clock.captured(call, 1)
        turns.append(Turn(name, timed, 1, how))
    rounds(turns, clock, count)
    found = figures(turns[1], turns[0])
    nbytes = sum(t.nbytes for made in held for tensors in made.values() for t in tensors.values())
    return (
        found
        | told(error)
        | {"speed": float(f"{1 / found['ratio']:.4g}"), "dense milliseconds": 1e3 * turns[0].median, "bytes": nbytes}
    )
