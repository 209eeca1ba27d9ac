"""What each exact rewrite does to the time of a small model, eager and under Inductor, also where it does nothing.

One small model a rewrite, one in which it has something to do. Each is timed as captured and as rewritten, on both targets,
side by side in one process (see harness.py); rows are held to the same model before, on the same target.

    python -m benchmarks.exact_rewrites --json FILE [--only 'merge|fold'] [--width 384] [--tokens 128] [--layers 4] [--quick]

Rows that FILE holds already are kept, not measured again: a run that was cut short goes on where it ended.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness import Contestant, Ready, Result, Row, measure


class Attention(nn.Module):
    """Self-attention, written out or fused, with or without biases."""

    def __init__(self, width: int, heads: int, *, bias: bool = True, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) * (w // self.heads) ** -0.5, -1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, w))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """Blocks with a residual stream that begins with a linear, so that it can be centred."""

    def __init__(self, width: int, layers: int, norm: Callable[[], nn.Module], block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norms = nn.ModuleList([norm() for _ in range(layers)])
        self.blocks = nn.ModuleList([block() for _ in range(layers)])
        self.last, self.head = norm(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(self.last(x))


class WrittenOut(nn.Module):
    """RMSNorm in elementary steps, as most language models have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Adapted(nn.Module):
    def __init__(self, width: int, rank: int = 16) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.base(x) + self.up(self.down(x)) * 0.5)


class Repeated(nn.Module):
    """The same positions computed in every layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.width = nn.Linear(width, width), width

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * torch.linspace(0, 1, self.width)
        return self.linear(x * angle.cos()).view(x.shape)


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def models(width: int, layers: int) -> dict[str, tuple[str, nn.Module]]:
    """For each name of a row: the passes, and a model in which they have something to do."""
    heads = max(1, width // 64)
    stack = lambda make: nn.Sequential(*(make() for _ in range(layers)))  # noqa: E731
    return {
        "merge_linears (qkv)": ("merge_linears", stack(lambda: Attention(width, heads))),
        "merge_linears (gate, up)": ("merge_linears", stack(lambda: Gated(width))),
        "fold_norm_scale (fused norm)": (
            "fold_norm_scale",
            PreNorm(width, layers, lambda: nn.LayerNorm(width), lambda: Gated(width)),
        ),
        "fold_norm_scale (written out)": (
            "fold_norm_scale",
            PreNorm(width, layers, lambda: WrittenOut(width), lambda: Gated(width)),
        ),
        "fold_batch_norm": ("fold_batch_norm", stack(_convolution)),
        "fold_scale": ("fold_scale", stack(lambda: Attention(width, heads, fused=False))),
        "drop_softmax_constant": ("drop_softmax_constant", stack(lambda: Attention(width, heads))),
        "fold_adapters": ("fold_adapters", stack(lambda: Adapted(width))),
        "multiply_adjacent": (
            "multiply_adjacent",
            stack(lambda: nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.ReLU())),
        ),
        "layer_norm_to_rms_norm": (
            "fold_norm_scale,layer_norm_to_rms_norm",
            PreNorm(width, layers, lambda: nn.LayerNorm(width), lambda: Gated(width)),
        ),
        "common_subexpressions": ("common_subexpressions,remove_idle", stack(lambda: Repeated(width))),
        "all by default": (
            "",
            PreNorm(width, layers, lambda: WrittenOut(width), lambda: Attention(width, heads, fused=False)),
        ),
    }


def fidelity(wanted: Tensor) -> Callable[[Callable[[Any], Any]], dict[str, float]]:
    """One less the relative error of the output: all rows are exact, so only rounding is seen."""

    def assess(run: Callable[[Any], Any]) -> dict[str, float]:
        found = run(None)
        return {"1 - error": 1 - float((found - wanted).norm() / wanted.norm())}

    return assess


def one(name: str, passes: str, model: nn.Module, x: Tensor, rounds: int, log: Callable[[str], None]) -> Result:
    import recast

    torch._dynamo.reset()  # graphs of the rows before count against the limit of recompilations
    program = recast.capture(model.eval(), (x,))
    told: dict[str, Any] = {}

    def prepare(rewritten: bool, target: str) -> Callable[[], Ready]:
        def made() -> Ready:
            chosen = program
            if rewritten:
                chosen = recast.simplify(program, passes) if passes else recast.simplify(program)
                told.update(chosen.rewrites.to_dict())
            artifact = recast.lower(chosen, target)
            steps = told.get("steps", []) if rewritten else []
            note = f"{sum(len(s['done']) for s in steps)} places" if rewritten else ""

            def run(_: Any) -> Any:
                with torch.no_grad():
                    return artifact(x)

            return Ready(run, chosen.nbytes(), note)

        return made

    contestants = []
    for target in ("eager", "inductor"):
        before = f"before, {target}"
        contestants.append(Contestant(before, prepare(False, target), target))
        contestants.append(Contestant(f"after, {target}", prepare(True, target), target, "recast", against=(before,)))
    with torch.no_grad():
        wanted = model(x)
    settings = {"passes": passes or "default", "input": list(x.shape)}
    return measure(
        name,
        contestants,
        None,
        baseline="before, eager",
        rounds=rounds,
        assess=fidelity(wanted),
        settings=settings,
        log=log,
    )


def table(results: list[Result]) -> Table:
    """One line a rewrite: time before and after on both targets, and what that is."""
    made = Table(title="exact_rewrites: milliseconds before -> after, ratio (below 1 is faster)", title_justify="left")
    made.add_column("rewrite")
    for target in ("eager", "inductor"):
        made.add_column(f"{target} before", justify="right")
        made.add_column("after", justify="right")
        made.add_column("ratio", justify="right")
    made.add_column("note")
    for result in results:
        cells, notes = [], []
        for target in ("eager", "inductor"):
            before, after = result.row(f"before, {target}"), result.row(f"after, {target}")
            if before is None or after is None:
                absent = next((r.absent for r in result.rows if r.target == target and r.absent), "not run")
                cells += ["-", "-", "-"]
                notes.append(f"{target}: {absent}")
                continue
            low, ratio, high = after.ratios(before)
            sure = "" if low <= 1 <= high else " faster" if high < 1 else " slower"
            cells += [f"{before.quartiles()[1]:.2f}", f"{after.quartiles()[1]:.2f}", f"{ratio:.2f}{sure}"]
            notes += [after.note] if after.note not in notes else []
        made.add_row(result.name, *cells, "; ".join(notes))
    return made


def kept(path: Path | None) -> dict[str, Result]:
    """What an earlier run wrote, by name of the row."""
    if path is None or not path.exists():
        return {}
    found = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        known = ("name", "target", "group", "bytes", "note", "fidelity", "absent", "prepare_seconds", "samples")
        rows = [Row(**{key: row[key] for key in known if key in row}) for row in entry["rows"]]
        for row in rows:
            row.against = (f"before, {row.target}",) if row.name.startswith("after") else ()
        name = entry["benchmark"]
        if any(row.absent for row in rows):
            continue  # it may work now
        found[name] = Result(name, entry["baseline"], entry["settings"], rows, entry["machine"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name it matches")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds: a look, not a measurement")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    console = Console(stderr=True)
    results: list[Result] = []
    earlier = kept(given.json)
    for name, (passes, model) in models(given.width, given.layers).items():
        if name in earlier:
            results.append(earlier[name])
            continue
        if not re.search(given.only, name):
            continue
        console.log(name)
        image = "batch_norm" in name
        x = torch.randn(given.batch, 8, given.tokens, given.tokens) if image else None
        x = torch.randn(given.batch, given.tokens, given.width) if x is None else x
        results.append(
            one(name, passes, model, x, 3 if given.quick else given.rounds, lambda text: console.log(f"  {text}"))
        )
        if given.json:  # after every row: compiling takes minutes
            rows = {"benchmark": "exact_rewrites", "rows": [result.to_dict() for result in results]}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            partial = given.json.with_name(given.json.name + ".partial")
            partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            partial.replace(given.json)
    Console(width=None if sys.stdout.isatty() else 160).print(table(results))


if __name__ == "__main__":
    main()
