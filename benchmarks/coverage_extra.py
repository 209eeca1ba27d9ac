"""The second leg of the coverage benchmark: the quick part of the zoo on the oldest torch and transformers that are supported.

Patterns follow how models are written and how `torch.export` writes them down, and both change between releases; the usual sign
is that fewer structures are found and nothing else. The leg makes an environment of its own, in which the lower bounds of
`pyproject.toml` are installed, runs the quick part there, and holds the counts to `tests/zoo/golden.json`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "zoo" / "golden.json"
KINDS = ("matrices", "attention", "moe", "norms")


def quick() -> list[str]:
    """The architectures with golden numbers."""
    return sorted(json.loads(GOLDEN.read_text()))


def oldest() -> dict[str, str]:
    """Lower bounds that `pyproject.toml` states for torch and transformers."""
    text = (ROOT / "pyproject.toml").read_text()
    return {name: re.findall(rf'"{name}>=([\d.]+)', text)[0] for name in ("torch", "transformers")}


def second_leg(torch: str, environment: Path | None, json_file: Path | None) -> int:
    """Install, run, compare; the exit status is 1 if anything that is there is found less often.

    Parameters
    ----------
    torch
        Its version; ``oldest`` for the lower bound, ``here`` to use the one that runs this (a build of an old release for
        CUDA is gigabytes, and registries keep few others).
    environment
        Where the environment is, or is to be made; a temporary folder without.
    json_file
        Where the figures go.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = environment or Path(made)
        python = _environment(folder, torch)
        figures = json_file or Path(made) / "coverage.json"
        command = [str(python), "-m", "benchmarks.coverage", "--quick", "--sizes", "example", "--json", str(figures)]
        path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        page = ["--page", str(Path(made) / "coverage.md")]
        subprocess.run([*command, *page], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)
        result = json.loads(figures.read_text())
    told = compared(result["rows"])
    print("\n".join([json.dumps(result["machine"]["libraries"]), *told]))
    return int(any(line.startswith("drop") for line in told))


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """What differs from the golden numbers, one line each; those that start with ``drop`` are worse."""
    golden = json.loads(GOLDEN.read_text())
    told = []
    same = 0
    for row in rows:
        name = row["name"]
        if why := row.get("unbuilt") or row.get("failed"):
            kind = "absent" if "no configuration of this name" in why else "drop"
            told.append(f"{kind} {name}: {why[:200]}")
            continue
        if not row.get("captured"):
            told.append(f"drop {name}: not captured: {row['capture_error'][:200]}")
            continue
        worse = [
            f"{kind} {row[kind][0]} of {row[kind][1]}, golden {golden[name][kind][0]} of {golden[name][kind][1]}"
            for kind in KINDS
            # What there is may differ between releases; what must not is how much of it is missed.
            if row[kind][1] - row[kind][0] > golden[name][kind][1] - golden[name][kind][0]
        ]
        odd = [f"differs from the model: {row['capture_differs']}"] if row["capture_differs"] else []
        odd += [f"wrong: {row['wrong_reason']}"] if row["wrong"] else []
        if worse or odd:
            told.append(f"drop {name}: {'; '.join([*worse, *odd])}")
        else:
            same += 1
    return [*told, f"{same} of {len(rows)} architectures as well recognised as with the golden numbers"]


def _environment(folder: Path, torch: str) -> Path:
    """Python of an environment with the old releases; made if it is not there."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if python.exists():
        return python
    bounds = oldest()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = [f"transformers=={bounds['transformers']}.*"]
    if torch != "here":
        version = bounds["torch"] if torch == "oldest" else torch
        wanted += [f"torch=={version}.*" if version.count(".") < 2 else f"torch=={version}"]
        wanted += ["networkx", "scipy", "pyyaml", "rich", "typer", "jinja2"]
    # Not with constraints.txt: it pins what is new.
    clean = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], env=clean, check=True)
    if torch == "here":
        inside = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        # What the environment lacks is taken from here; what it has comes first.
        (Path(inside.stdout.strip()) / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
