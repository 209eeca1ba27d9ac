"""What recast adds to compilation: capture, match, rewrite and verify for Llama-shaped models of 2 to 128 layers.

python -m benchmarks.compile_time --json benchmarks/results/compile_time.json

Every stage is timed in the `torch.compile` backend's own path, beside Inductor's compilation of the same graph with its caches
off. The models are narrow, so that fitting weights costs nothing and the number of nodes is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine_facts
from recast.lowering.inductor.compile import compile_graph
from recast.lowering.inductor.kernels import choice
from recast.passes.cache import OperatorCache
from recast.passes.plan import plan
from recast.passes.rewrite import rewrite
from recast.patterns.capture.dynamo import from_dynamo
from recast.patterns.find import coverage

STAGES = ("capture", "match", "plan and rewrite", "verify")


def model_of(layers: int) -> torch.nn.Module:
    """Llama-shaped, 64 wide, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def measure(layers: int, *, inductor: bool) -> dict[str, Any]:
    """Seconds of each stage for one depth."""
    row: dict[str, Any] = {"layers": layers}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        row[name] = time.perf_counter() - start
        return result

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        cache = OperatorCache(None)
        captured = timed("capture", lambda: from_dynamo(gm, inputs))
        program = captured.program
        row["nodes"] = len(program.graph.nodes)
        timed("match", lambda: coverage(program))
        settings: dict[str, Any] = {"cache": cache, "progress": False, "pictures": False, "measure": False}
        decided = plan(program, "int8", cache=cache, progress=False)  # fits the weights, once, untimed
        row["sites"] = len(decided.entries)

        def again() -> Any:
            return rewrite(program, plan(program, "int8", cache=cache, progress=False), verification=False, **settings)

        rewritten = timed("plan and rewrite", again)
        start = time.perf_counter()
        rewrite(program, decided, verification=True, **settings)
        row["verify"] = max(0.0, time.perf_counter() - start - row["plan and rewrite"])
        if not inductor:
            return gm.forward
        kept = [inputs[position] for position in captured.kept]
        compiled, _ = timed(
            "inductor", lambda: compile_graph(rewritten, kept, choice(frozen=False), freezing=False, options={})
        )
        return lambda *args: compiled(*[args[position] for position in captured.kept])

    torch._dynamo.reset()
    model, ids = model_of(layers), torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        start = time.perf_counter()
        torch.compile(model, backend=backend)(input_ids=ids)
        row["whole"] = time.perf_counter() - start
    row["recast"] = sum(row[stage] for stage in STAGES if stage != "verify")
    if inductor:
        row["share of inductor"] = row["recast"] / row["inductor"]
    return row


def recognition(nodes: int) -> dict[str, Any]:
    """Seconds to recognise everything in one program of many nodes: a two-layer model again and again, each with its own weights."""
    import copy

    from recast.patterns.capture.export import capture
    from recast.patterns.program import get_by_path, set_by_path
    from recast.patterns.recognise import recognise

    one = capture(model_of(2), (), {"input_ids": torch.randint(0, 256, (2, 16))})
    whole = copy.copy(one)
    root, graph = torch.nn.Module(), torch.fx.Graph()
    inputs = {node: graph.node_copy(node) for node in one.inputs()}
    results: list[Any] = []
    made = 0
    while made < nodes:
        environment = dict(inputs)
        for node in one.graph.nodes:
            if node.op == "get_attr":
                path = f"copy{len(results)}.{node.target}"
                set_by_path(root, path, get_by_path(one.module, str(node.target)).clone())
                environment[node] = graph.create_node("get_attr", path)
                environment[node].meta = dict(node.meta)
            elif node.op == "call_function":
                environment[node] = graph.node_copy(node, lambda n, known=environment: known[n])
            elif node.op == "output":
                results += [environment[n] for n in node.args[0] if isinstance(n, torch.fx.Node)]
            made += 1
    graph.output(tuple(results))
    whole.module = torch.fx.GraphModule(root, graph)
    start = time.perf_counter()
    found = recognise(whole)
    seconds = time.perf_counter() - start
    kinds: dict[str, int] = {}
    for site in found.sites:
        kinds[site.kind] = kinds.get(site.kind, 0) + 1
    return {"nodes": len(graph.nodes), "seconds": seconds, "sites": kinds, "misses": len(found.misses)}


def main(arguments: list[str] | None = None) -> int:
    """Measure all depths, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--inductor-up-to", type=int, default=128, help="deepest model that Inductor compiles too")
    parser.add_argument("--recognise", type=int, default=100_000, help="nodes of the program that is recognised whole")
    chosen = parser.parse_args(arguments)
    large = recognition(chosen.recognise) if chosen.recognise else None
    measure(1, inductor=True)  # imports and one-time set-up
    rows = []
    for layers in chosen.layers:
        rows.append(measure(layers, inductor=layers <= chosen.inductor_up_to))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, file=sys.stderr, flush=True)
    table = Table(title="Seconds to compile, by depth")
    names = ["layers", "nodes", "sites", *STAGES, "recast", "inductor", "share of inductor", "microseconds a node"]
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        row["microseconds a node"] = 1e6 * row["recast"] / row["nodes"]
        shown = [row.get(name) for name in names]
        table.add_row(*["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in shown])
    Console(width=150).print(table)
    print("recast = capture + match + plan and rewrite, without verification and without fitting weights")
    if large is not None:
        print(
            f"recognition of {large['nodes']:,} nodes: {large['seconds']:.2f} s, {large['sites']}, {large['misses']} misses"
        )
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(
            json.dumps(
                {"benchmark": "compile_time", "machine": machine_facts(), "rows": rows, "recognition": large}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
