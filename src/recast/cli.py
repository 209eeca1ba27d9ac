"""The command line: ``recast demo | inspect | optimize | generate | compare | forms | explain | replay``."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from recast.patterns.errors import CaptureError, CoverageError, RecastError, TargetError

__all__ = ["app", "main"]

DONE, MISSED, BAD_INPUT, DEFECT, INTERRUPTED = 0, 1, 2, 3, 130

# Typer brings a click of its own or uses the installed one, by version: the class is found through a public one.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="recast",
    help="Find every weight matrix of a PyTorch model, rewrite it into a cheaper form, prove it, run it.",
    epilog="Exit status: 0 done; 1 a threshold was missed; 2 bad input (one message, nothing half written); 3 a defect of "
    "recast; 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, package.module:function, a saved artifact's directory, or an .onnx file.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a batch.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use the first so many rows at most.", show_default=True)
]


def main() -> NoReturn:
    """Run the command line and exit: the entry point ``recast``."""
    signal.signal(signal.SIGTERM, _terminated)  # so that temporary files go, as with Ctrl-C
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command; give the exit status. Errors a user can cause are one message on standard error."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch's and transformers' advice is for those who call them
    os.environ.setdefault("TORCH_LOGS", "-all")  # the same for what torch logs; read when it is imported
    try:
        status = app(args=arguments, prog_name="recast", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED:  # some versions of typer turn Ctrl-C into this
            raise KeyboardInterrupt
        return status if isinstance(status, int) else DONE
    except CoverageError as error:
        return _complain(error, MISSED)
    except RecastError as error:
        return _complain(error, BAD_INPUT)
    except _UsageError as error:  # unknown options, missing arguments
        error.show(file=sys.stderr)
        return BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted: temporary files are removed, fitted operators are kept for the next run", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `recast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return _complain(error, BAD_INPUT)
    except Exception:  # noqa: BLE001  # a defect: shown in full, with a status of its own
        traceback.print_exc()
        print("recast: this is a defect of recast; please report it with the lines above", file=sys.stderr)
        return DEFECT


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _complain(error: Exception, status: int) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("error: ", "bold red"), str(error)))
    return status


def _out() -> Console:
    # Not on a terminal rich assumes 80 columns, which folds every table.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    return Console(width=width, highlight=False)


def _print_json(data: Any) -> None:
    print(json.dumps(_finite(data), indent=1, allow_nan=False, default=str))


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def _say(text: str) -> None:
    """What happens, on standard error and on a terminal only."""
    if sys.stderr.isatty():
        Console(stderr=True, highlight=False).print(Text(text, style="dim"))


def _tell(text: str) -> None:
    """What happens, on standard error, with the time: for work of minutes, on a terminal or in a log."""
    Console(stderr=True, highlight=False).print(Text(f"{time.strftime('%H:%M:%S')} {text}", style="dim"))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import recast

        print(f"recast {recast.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.Exit(BAD_INPUT)


@app.command(epilog="Example: [bold]recast inspect ./all-MiniLM-L6-v2[/bold]")
def inspect(
    model: ModelArgument,
    as_json: JsonOption = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the captured graph too.")] = False,
    min_coverage: Annotated[
        float, typer.Option("--min-coverage", min=0, max=1, help="Exit with 1 if less of the parameters is matched.")
    ] = 0.0,
) -> None:
    """What a model is made of: its matrices, what share of it they are, and why everything else is none."""
    from recast.models import load_model
    from recast.passes.plan import check_coverage
    from recast.patterns.find import coverage

    loaded = load_model(model)
    listed: dict[str, Any] = {}
    if loaded.kind == "onnx":
        from recast.onnx_file import described, inspect_onnx

        listed, text = inspect_onnx(Path(model))
        try:
            loaded.program()
        except (CaptureError, TargetError) as error:  # what it is made of can be told all the same
            listed["notes"] = [f"cannot be rewritten: {error}"]
            _print_json(listed) if as_json else _out().print(Text(f"{text}\n{listed['notes'][0]}"))
            return
    program = loaded.program()
    covered = coverage(program)
    check_coverage(covered.fraction, min_coverage, covered)
    if as_json:
        found = {"model": loaded.label, **covered.to_dict(), "site_list": [s.to_dict() for s in covered.sites]}
        found = described(program, listed, found) if listed else found
        _print_json({**found, "notes": list(program.notes)})
        return
    from recast.views import inspection

    console = _out()
    if graph:
        console.print(Text(str(program)), soft_wrap=True)
    for part in inspection(loaded, program, covered):
        console.print(part)


@app.command(
    epilog="Example: [bold]recast optimize ./all-MiniLM-L6-v2 -r int8 -c sentences.txt -t onnx -o small[/bold]"
)
def optimize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The artifact's directory, made anew.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="A form such as 'low_rank(ratio=0.5) | int8', or a YAML file. [default: int8]"
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", "-c", help="Real inputs: .txt, .jsonl, .safetensors; or saved statistics."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="eager, inductor, triton or onnx. [default: onnx for an .onnx file, else inductor]",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Share of the dense bytes to use, such as 0.4x or 40%.")
    ] = None,
    min_coverage: Annotated[
        float | None,
        typer.Option("--min-coverage", min=0, max=1, help="Exit with 1 if less of the parameters is matched."),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Carry out this plan (YAML) in place of a recipe.")
    ] = None,
    save_plan: Annotated[Path | None, typer.Option("--save-plan", help="Write the plan here too.")] = None,
    save_statistics: Annotated[
        Path | None, typer.Option("--save-statistics", help="Write the statistics here, for a later --calibrate.")
    ] = None,
    batch_size: BatchOption = 8,
    limit: LimitOption = 256,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Fit so many sites at a time, each on one core.", show_default=False),
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Fit each matrix on what reaches it behind those rewritten before it."),
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            help="Numbers of vectors, as 1,128: time every form with them, leave dense what is slower at all of them.",
        ),
    ] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Refuse nothing for being slower than dense.")
    ] = False,
    cache: Annotated[
        bool,
        typer.Option("--cache", help="A decoder with its key-value cache as inputs and outputs, for recast generate."),
    ] = False,
    accuracy_level: Annotated[
        int | None,
        typer.Option("--accuracy-level", help="Of --target onnx: 0 exact, 4 rounds what 4-bit weights meet to int8."),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option("--embeddings", help="Of --target onnx: form of tables that are looked up, int4(group=32), say."),
    ] = None,
    genai: Annotated[
        bool, typer.Option("--genai", help="With --cache: write genai_config.json for onnxruntime-genai too.")
    ] = False,
    style: Annotated[
        str | None,
        typer.Option(
            "--style",
            help="Of --target onnx: qoperator for ONNX Runtime, qdq for OpenVINO, TensorRT, QNN and DirectML.",
        ),
    ] = None,
    cache_type: Annotated[
        str | None,
        typer.Option("--cache-type", help="With --cache: int8 holds keys and values in bytes; by default float."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a model by a recipe, check it, and write an artifact with its report."""
    from recast.optimizing import Request, optimize_model
    from recast.passes.render import report_tables

    request = Request(
        model=model,
        out=out,
        recipe=recipe,
        calibrate=calibrate,
        target=target,
        budget=budget,
        min_coverage=min_coverage,
        plan=plan_file,
        save_plan=save_plan,
        save_statistics=save_statistics,
        batch_size=batch_size,
        limit=limit,
        force=force,
        jobs=jobs,
        sequential=sequential,
        tokens=tokens,
        allow_slower=allow_slower,
        cache=cache,
        genai=genai,
        accuracy_level=accuracy_level,
        embeddings=embeddings,
        style=style,
        cache_type=cache_type,
    )
    report = optimize_model(request, _say)
    if as_json:
        _print_json({**report.to_dict(), "out": str(out)})
        return
    console = _out()
    for part in report_tables(report, most=40):
        console.print(part)
    console.print(Text(f"written to {out}; see {out / 'report.html'}"))


@app.command(epilog="Example: [bold]recast generate small --prompt 'def main(' --max-new-tokens 32[/bold]")
def generate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="An artifact of optimize --cache -t onnx.", show_default=False)
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to write on from.")] = None,
    ids: Annotated[str | None, typer.Option("--ids", help="Token ids in its place, as 5,17,3.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Divides the logits before one is drawn; 0: the largest is taken.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from so many of the largest only; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the fewest that make this share only.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the drawing.", show_default=False)] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of tokenizer.json, if not DIR.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write on from a prompt with a decoder exported to ONNX, as it comes, and tell how fast that was."""
    from recast.generating import generate_text

    wanted = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    found = generate_text(directory, prompt, ids, tokenizer, max_new_tokens, wanted, quiet=as_json)
    if as_json:
        _print_json(found)


@app.command(epilog="Example: [bold]recast compare ./all-MiniLM-L6-v2 small smaller --on sentences.txt[/bold]")
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR_OR_MODEL...", help="The first is what the others are compared with.", show_default=False
        ),
    ],
    on: Annotated[Path, typer.Option("--on", help="Inputs: .txt, .jsonl or .safetensors.", show_default=False)],
    batch_size: BatchOption = 8,
    limit: LimitOption = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed turns; the median is shown.")] = 7,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML page here.")] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Where each ONNX model begins to differ from the first, a program.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Of --bisect: relative to the largest number of a value.")
    ] = 1e-3,
    as_json: JsonOption = False,
) -> None:
    """Fidelity, size and time of models and artifacts side by side, measured in one process, in turns."""
    from recast.comparison import compare as measure
    from recast.data import read_batches
    from recast.models import load_model
    from recast.passes.render import comparison_table, page

    if not on.is_file():
        read_batches(on, load_model(models[0]))  # says what is wrong before the others are loaded
    loaded = [load_model(name) for name in models]
    tokenizes = next((m for m in loaded if m.has_tokenizer), loaded[0])
    batches = read_batches(
        on, dataclasses.replace(loaded[0], directory=tokenizes.directory), batch_size=batch_size, limit=limit, say=_say
    )
    if bisect:
        from recast.bisecting import bisect_models

        differences = bisect_models(loaded, batches[0], tolerance=tolerance)
        if as_json:
            _print_json({"differences": {name: dataclasses.asdict(found) for name, found in differences.items()}})
            return
        for name, found in differences.items():
            _out().print(f"{name}: {found}", highlight=False, markup=False)
        return
    rows = measure(loaded, batches, rounds=rounds)
    if report is not None:
        written = next((m.artifact.report for m in loaded if m.artifact is not None), None)
        report.write_text(page(written or {}, title="recast compare", rows=rows), encoding="utf-8")
    if as_json:
        _print_json({"rows": rows, "on": str(on), "batches": len(batches), "rounds": rounds})
        _all_ran(rows)
        return
    shape = {name: tuple(value.shape) for name, value in batches[0].items()}
    title = f"{len(batches)} batches of {on.name}, the first timed: " + ", ".join(f"{n} {s}" for n, s in shape.items())
    _out().print(comparison_table(rows, title))
    _all_ran(rows)


def _all_ran(rows: list[dict[str, Any]]) -> None:
    """End with the status of bad input if a model could not be compared: a script must not take that for success."""
    if any("error" in row for row in rows):
        raise typer.Exit(2)


@app.command("forms", epilog="Example: [bold]recast forms low_rank 'low_rank(0.5) | int8'[/bold]")
def list_forms(
    asked: Annotated[
        list[str] | None, typer.Argument(metavar="[FORM]...", help="Names or expressions; all forms if there are none.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The weight forms, their parameters, and what each target runs them with on this machine."""
    from recast.listing import forms_by_target
    from recast.views import forms_tables

    rows = forms_by_target(*asked or ())
    if as_json:
        _print_json({"forms": rows})
        return
    console = _out()
    for part in forms_tables(rows):
        console.print(part)


@app.command(epilog="Example: [bold]recast explain ./all-MiniLM-L6-v2 encoder.layer.0.attention.self.query[/bold]")
def explain(
    model: ModelArgument,
    site: Annotated[str, typer.Argument(metavar="SITE", help="A site, weight, module or value of the graph.")],
    as_json: JsonOption = False,
) -> None:
    """What a place in a model is, the nearest pattern, and why it did not match."""
    from recast.explaining import explain as look
    from recast.models import load_model
    from recast.views import explanation

    found = look(load_model(model).program(), site)
    if as_json:
        _print_json(found)
        return
    console = _out()
    for part in explanation(found):
        console.print(part)


@app.command(epilog="Example: [bold]recast replay recast-verification-k3x9[/bold]")
def replay(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What a failed verification wrote.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Run the passes of a failed verification again; ends with 1 if the failure is still there."""
    from recast.passes.failure import read_failure
    from recast.passes.failure import replay as run_again
    from recast.patterns.errors import VerificationError

    failure = read_failure(folder)
    said: list[str] = []
    found: dict[str, Any] = {"pipeline": str(failure.pipeline), "then": failure.message, "torch": failure.torch}
    try:
        run_again(failure, said.append)
        found["now"] = None
    except VerificationError as error:
        found["now"] = str(error)
    if as_json:
        _print_json({**found, "passes": said})
    else:
        console = _out()
        for line in [f"pipeline: {failure.pipeline}", f"then (torch {failure.torch}): {failure.message}", *said]:
            console.print(Text(line), soft_wrap=True)
        console.print(Text(found["now"] or "now: every pass is verified"), soft_wrap=True)
    if found["now"] is not None:
        raise typer.Exit(MISSED)


@app.command(epilog="Example: [bold]recast demo --out recast-demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; a former demo there is replaced.")] = Path(
        "recast-demo"
    ),
    targets: Annotated[str, typer.Option("--targets", help="Targets to run, separated by commas.")] = "inductor,onnx",
    batch: Annotated[int, typer.Option("--batch-size", min=2, help="Sentences of the timed batch.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed turns; the median is shown.")] = 5,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that is not a former demo.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The main job on a real model: MiniLM-L6 under several recipes, side by side on every target."""
    from recast.demo import run_demo
    from recast.passes.render import comparison_table

    result = run_demo(out, targets=targets.split(","), batch=batch, rounds=rounds, force=force, say=_tell)
    if as_json:
        _print_json(result)
        return
    console = _out()
    console.print(comparison_table(result["rows"], result["title"], per_target=True))
    console.print(Text(f"written to {out}; open {out / 'report.html'} ({result['seconds']:.0f} seconds in all)"))
