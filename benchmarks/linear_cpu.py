"""One product of a language model on a CPU: which operation serves each kind of weight best, by the number of tokens.

Every contestant multiplies x (tokens, n) by the same weight (m, n). Weights lie in several copies that take turns, together larger
than the caches, as those of a model's many layers do; x is in the cache. All take turns in one process (`lowering.timing.medians`).

    python -m benchmarks.linear_cpu --json FILE [--shapes 2048x8192 ...] [--tokens 1 16 ...] [--only REGEX]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.harness import machine_facts
from recast.lowering.timing import medians
from recast.passes.forms import Form

SHAPES, TOKENS = ("1536x384", "8192x2048", "11008x4096"), (1, 4, 16, 64, 256, 1024)
FORMS = ("int8", "int4(group=128)", "int3(group=128)", "int2(group=64)", "nf4(group=64)")
_TOGETHER = 96 << 20  # bytes of a contestant's copies: three times the largest cache of the machines at hand

Run = Callable[[Tensor], Tensor]


class Contestant:
    """A way to multiply: `copies` of its weight take turns, each with `run(weight, x)`."""

    def __init__(self, name: str, weights: list[Any], run: Callable[[Any, Tensor], Any], nbytes: int) -> None:
        self.name, self.nbytes, self._weights, self._run = name, nbytes, itertools.cycle(weights), run

    def __call__(self, x: Tensor) -> Any:
        return self._run(next(self._weights), x)


def contestants(weight: Tensor) -> Iterator[Contestant]:
    """Dense in two formats, PyTorch's own packed products, ONNX Runtime's, and recast's forms."""
    yield _dense("F.linear fp32", weight)
    yield _dense("F.linear bf16", weight.to(torch.bfloat16))
    yield from _of_torch(weight)
    yield from _of_onnx_runtime(weight)
    for text in FORMS:
        yield _of_recast(text, weight)
        if text.startswith("int"):
            yield _of_recast(text, weight, rounded=True)
    yield from _with_rounded_inputs(weight)


def _copies(parts: Any, nbytes: int, clone: Callable[[Any], Any]) -> list[Any]:
    return [parts, *(clone(parts) for _ in range(_TOGETHER // nbytes))]


def _dense(name: str, weight: Tensor) -> Contestant:
    def run(w: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x if x.dtype == w.dtype else x.to(w.dtype), w)

    return Contestant(name, _copies(weight, weight.nbytes, Tensor.clone), run, weight.nbytes)


def _of_torch(weight: Tensor) -> Iterator[Contestant]:
    """`_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm`, in bfloat16, which they are written for."""
    m, n = weight.shape
    codes = torch.randint(0, 16, (m, n), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(n // 128, m, 2, dtype=torch.bfloat16)

    def int4(w: Tensor, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), w, 128, scales)
        return y

    yield Contestant("torch int4 g128, bf16", _copies(packed, packed.nbytes, Tensor.clone), int4, packed.nbytes)
    eight = torch.randint(-127, 128, (m, n), dtype=torch.int8)
    scale = torch.rand(m, dtype=torch.bfloat16)

    def int8(w: Tensor, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), w, scale)
        return y

    yield Contestant("torch int8, bf16", _copies(eight, eight.nbytes, Tensor.clone), int8, eight.nbytes)


def _of_onnx_runtime(weight: Tensor) -> Iterator[Contestant]:
    """`MatMulNBits` of four bits: multiplied in float32 (accuracy level 1), or with x rounded to int8 (4)."""
    import onnx
    import onnxruntime

    m, n = weight.shape
    packed = torch.randint(0, 256, (m, n // 128, 64), dtype=torch.uint8).numpy()
    scales = torch.rand(m * n // 128).numpy()
    for level, said in ((1, "fp32"), (4, "x in int8")):
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=n, N=m, bits=4, block_size=128,
            accuracy_level=level,
        )  # fmt: skip
        sides = [onnx.helper.make_tensor_value_info(k, 1, ["t", s]) for k, s in (("x", n), ("y", m))]
        held = [onnx.numpy_helper.from_array(a, k) for a, k in ((packed, "w"), (scales, "s"))]
        graph = onnx.helper.make_graph([node], "product", sides[:1], sides[1:], held)
        imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # its threads wait while others are timed
        content = model.SerializeToString()
        make = lambda _, content=content, options=options: onnxruntime.InferenceSession(  # noqa: E731
            content, options, providers=["CPUExecutionProvider"]
        )

        def run(session: Any, x: Tensor) -> Any:
            return session.run(None, {"x": x.numpy()})

        yield Contestant(
            f"ONNX Runtime int4 g128, {said}", _copies(make(None), packed.nbytes, make), run, packed.nbytes
        )


def _with_rounded_inputs(weight: Tensor) -> Iterator[Contestant]:
    """``int8(activations=true)`` as it runs on this CPU, if there is a kernel for it."""
    from recast.lowering.inductor.rounded import KERNEL, rounded_product

    operator = Form.parse("int8(activations=true)").fit(weight)
    packed = rounded_product(operator)
    if packed is not None:
        nbytes = sum(tensor.nbytes for tensor in packed.held.values())
        copies = _copies(packed.held, nbytes, lambda held: {name: tensor.clone() for name, tensor in held.items()})
        yield Contestant(f"recast int8(activations=true), {KERNEL}", copies, packed.run, nbytes)


def _of_recast(text: str, weight: Tensor, *, rounded: bool = False) -> Contestant:
    from recast.lowering.inductor.weight_only import weight_only

    operator = Form.parse(
        text.replace("group", "clip=false, group") if text.startswith("int") and "group" in text else text
    )
    packed = weight_only(operator.fit(weight), rounded=rounded)
    assert packed is not None
    nbytes = sum(tensor.nbytes for tensor in packed.held.values())

    def clone(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in held.items()}

    name = f"recast {text}" + ", x in int8" * rounded
    return Contestant(name, _copies(packed.held, nbytes, clone), packed.run, nbytes)


def bandwidth() -> float:
    """Bytes a second that this machine reads: of a sum over more than the caches hold."""
    much = torch.ones(256 << 18)
    (seconds,) = medians([much.sum], torch.device("cpu"))
    return much.nbytes / seconds


def row(shape: str, tokens: int, found: list[Contestant], rounds: int) -> dict[str, Any]:
    """Milliseconds of every contestant, taking turns."""
    x = torch.randn(tokens, int(shape.split("x")[1]))
    seconds = medians([lambda c=c: c(x) for c in found], x.device, rounds=rounds)
    times = {c.name: round(1e3 * s, 4) for c, s in zip(found, seconds, strict=True)}
    return {"shape": shape, "tokens": tokens, "milliseconds": times}


def show(result: dict[str, Any], console: Console) -> None:
    """A table for each shape: contestants down, tokens across, the fastest of each column marked."""
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["shape"] == shape]
        table = Table(title=f"{shape}: milliseconds (times the speed of F.linear fp32)", title_justify="left")
        for heading in ("", "MB", "floor", *(f"{row['tokens']} tokens" for row in rows)):
            table.add_column(heading, justify="right" if heading else "left")
        for name in rows[0]["milliseconds"]:
            cells = []
            for row in rows:
                times = row["milliseconds"]
                best = min(times.values()) == times[name]
                cell = f"{times[name]:.3g} ({times['F.linear fp32'] / times[name]:.2f}x)"
                cells.append(f"[green]{cell}[/]" if best else cell)
            nbytes = result["bytes"][shape][name]
            table.add_row(name, f"{nbytes / 1e6:.1f}", f"{1e3 * nbytes / result['bandwidth']:.2g}", *cells)
        console.print(table)
    console.print(f"floor: milliseconds to read the weight at {result['bandwidth'] / 1e9:.1f} GB/s, as measured here")


def main(arguments: list[str] | None = None) -> int:
    """Time all shapes and counts, print, and write the file after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxINPUTS")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants whose name matches, and F.linear fp32")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    result: dict[str, Any] = {"benchmark": "linear_cpu", "machine": machine_facts(), "bandwidth": bandwidth()}
    result |= {"bytes": {}, "rows": []}
    console = Console(width=None if sys.stdout.isatty() else 200)
    for shape in given.shapes:
        rows, features = map(int, shape.split("x"))
        weight = torch.randn(rows, features)
        found = [c for c in contestants(weight) if c.name == "F.linear fp32" or re.search(given.only, c.name)]
        result["bytes"][shape] = {c.name: c.nbytes for c in found}
        for tokens in track(given.tokens, shape, console=console, disable=not console.is_terminal):
            result["rows"].append(row(shape, tokens, found, given.rounds))
            if given.json:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
