"""The folders at the top of the repository import as recast.*, never by their bare names, and keep their boundaries."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import recast

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "lowering", "passes", "patterns")

# A folder may import, of ours, only what begins with one of these.
ALLOWED = {
    "kernels": ("recast.kernels",),
    "patterns": ("recast.patterns",),
    "passes": ("recast.patterns", "recast.kernels", "recast.passes"),
    "lowering": ("recast.patterns", "recast.kernels", "recast.passes", "recast.lowering"),
}
OPTIONAL = {"triton", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "ray", "openvino", "nncf"}
SOURCES = sorted(p for folder in (*FOLDERS, "src/recast") for p in (ROOT / folder).rglob("*.py"))


def imports(node: ast.AST, *, deep: bool) -> Iterator[tuple[int, str]]:
    """Lines and full names of what is imported; without `deep`, only what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield child.lineno, alias.name
        elif isinstance(child, ast.ImportFrom):
            # `from recast import x` may mean the module recast.x, so it is read as that.
            for alias in child.names:
                yield child.lineno, f"{'.' * child.level}{child.module or ''}.{alias.name}"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deep:
            continue
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not deep:
            for other in child.orelse:
                yield from imports(ast.Module([other], []), deep=deep)
        else:
            yield from imports(child, deep=deep)


def broken_rules(path: Path, text: str) -> list[str]:
    """What `text`, as the file `path` (relative to the root), imports against the rules."""
    tree = ast.parse(text)
    folder = path.parts[0]
    found = []
    for line, name in imports(tree, deep=True):
        ours = name.split(".")[0] == "recast" or name.split(".")[0] in FOLDERS
        if name.startswith("."):
            found.append(f"{path}:{line}: relative import of {name}")
        elif name.split(".")[0] in FOLDERS:
            found.append(f"{path}:{line}: {name} by its bare name; say recast.{name}")
        elif ours and folder in ALLOWED and not any(f"{name}.".startswith(f"{ok}.") for ok in ALLOWED[folder]):
            found.append(f"{path}:{line}: {folder} may not import {name}; of ours, only {', '.join(ALLOWED[folder])}")
    if not (folder == "kernels" and path.name == "triton.py"):
        for line, name in imports(tree, deep=False):
            if name.split(".")[0] in OPTIONAL:
                found.append(f"{path}:{line}: {name} is optional; import it inside the function that needs it")
    return found


def python(code: str, cwd: Path) -> str:
    """Output of a fresh interpreter, with `cwd` (and not the folder of a script) first on its path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", FOLDERS)
def test_bare_names_do_not_resolve_into_the_checkout(name: str) -> None:
    spec = find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    assert not [p for p in places if p and Path(p).resolve().is_relative_to(ROOT)]


@pytest.mark.parametrize("name", FOLDERS)
def test_links_are_relative_links(name: str) -> None:
    link = ROOT / "src" / "recast" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / ".." / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", FOLDERS)
def test_mounted_folders_have_no_init_and_their_subfolders_do(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()
    packages = {p.parent for p in (ROOT / name).rglob("*.py")} - {ROOT / name}
    assert not [p for p in sorted(packages) if not (p / "__init__.py").exists()]


def test_a_clone_without_links_says_so(tmp_path: Path) -> None:
    (tmp_path / "recast").mkdir()
    text = (ROOT / "src" / "recast" / "__init__.py").read_text(encoding="utf-8")
    (tmp_path / "recast" / "__init__.py").write_text(text, encoding="utf-8")
    for name in FOLDERS:  # what git writes in place of a link
        (tmp_path / "recast" / name).write_text(f"../../{name}", encoding="utf-8")
    code = "try:\n import recast\nexcept ImportError as e: print(e)"
    assert "git clone -c core.symlinks=true" in python(code, tmp_path)


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in SOURCES])
def test_who_may_import_whom(path: str) -> None:
    assert broken_rules(Path(path), (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("kernels/linear/reference.py", "def f():\n    from recast.patterns import errors", "kernels may not import"),
        ("patterns/sites.py", "from recast import passes", "patterns may not import recast.passes"),
        ("passes/plan.py", "import recast.lowering.eager", "passes may not import"),
        ("lowering/artifact.py", "from recast.backend import recast", "lowering may not import"),
        ("lowering/artifact.py", "import recast", "lowering may not import"),
        ("passes/plan.py", "from passes.base import Pass", "say recast.passes"),
        ("passes/plan.py", "from .base import Pass", "relative"),
        ("lowering/onnx/export.py", "try:\n    import onnx\nexcept ImportError: pass", "optional"),
        ("kernels/linear/reference.py", "import triton", "optional"),
    ],
)
def test_the_rules_find_what_breaks_them(path: str, text: str, said: str) -> None:
    assert [line for line in broken_rules(Path(path), text) if said in line]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/linear/triton.py", "import triton.language as tl"),
        ("lowering/onnx/export.py", "def f():\n    import onnx"),
        ("lowering/onnx/export.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx"),
        ("src/recast/backend.py", "from recast.lowering.inductor import compile"),
        ("passes/plan.py", "from recast.patterns.sites import Site\nfrom recast.kernels.linear import reference"),
    ],
)
def test_the_rules_let_through_what_keeps_them(path: str, text: str) -> None:
    assert broken_rules(Path(path), text) == []


def test_import_is_light(tmp_path: Path) -> None:
    code = f"import sys, recast, torch; print({OPTIONAL!r} & sys.modules.keys(), torch.cuda.is_initialized())"
    assert python(code, tmp_path) == "set() False"


def test_transformers_works_from_the_checkout_root() -> None:
    pytest.importorskip("transformers")
    code = (
        "import sys, torch, recast\n"
        "assert sys.path[0] == ''\n"
        "from transformers import BertConfig, BertModel\n"
        "config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,"
        " intermediate_size=8)\n"
        "model = BertModel(config).eval()\n"
        "print(tuple(model(torch.arange(5)[None]).last_hidden_state.shape))"
    )
    assert python(code, ROOT) == "(1, 5, 8)"


def test_version_is_written_once() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{recast.__version__}"' in text


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
