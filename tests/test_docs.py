"""Every Python snippet in README and docs runs, in order, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path, language: str) -> str:
    return "\n".join(
        re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p, "python")], ids=lambda p: p.name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text(snippets(page, "python"), encoding="utf-8")
    environment = {**os.environ, "RECAST_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_pages_name_only_commands_that_exist() -> None:
    from typer.main import get_command

    from recast.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    for page in PAGES:
        for command in re.findall(r"\brecast ([a-z]+)\b(?= [A-Z./\-]|$)", snippets(page, "console")):
            assert command in known, f"{page.name} speaks of 'recast {command}'"


def test_every_method_is_spelled_in_words_that_parse() -> None:
    from recast.passes.forms import Form

    rows = [line.split(" | ") for line in (ROOT / "docs" / "methods.md").read_text("utf-8").splitlines() if "`" in line]
    found = [
        text.replace("\\|", "|") for row in rows if row[0].startswith("| ") for text in re.findall(r"`([^`]+)`", row[1])
    ]
    texts = [text for text in found if not text.endswith("=True") and "=" not in text.partition("(")[0]]
    assert len(texts) > 45
    for text in texts:
        assert str(Form.parse(str(Form.parse(text)))) == str(Form.parse(text))
