"""C sources of kernels, compiled for this machine when they are first needed, and kept.

They are compiled by the compiler that Inductor needs as well, without any header of torch, in a second or two.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recast.kernels.kept import cache_directory

__all__ = ["Source", "compiler", "load_library", "why_not"]

# No -ffast-math: gcc 12 then reorders sums that were written in the order that suits the registers, with three times the code.
_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-Wfatal-errors",  # the first, such as which instructions are missing, is what there is to tell
)

_HEADERS = Path(__file__).parent  # what sources share lies beside this file


def compiler() -> str | None:
    """Return the C compiler: ``$CC``, else gcc or clang where there is one."""
    for name in (os.environ.get("CC", ""), "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


@functools.cache
def why_not() -> str | None:
    """Say why nothing can be compiled here; None where it can.

    Examples
    --------
    >>> why_not() is None or "compiler" in why_not()
    True
    """
    if platform.system() != "Linux":
        return "recast compiles C kernels on Linux only"
    if compiler() is None:
        return "no C compiler: gcc or clang would do"
    return None


class Source:
    """A C source, compiled and loaded when it is first called.

    Parameters
    ----------
    beside
        ``__file__`` of the Python file of its name.
    functions
        Types of the arguments of each of its functions, and of what it returns.

    Examples
    --------
    >>> missing = Source("/nowhere/kernel.py", {"run": ([], None)})
    >>> missing.unavailable() is not None
    True
    """

    def __init__(self, beside: str, functions: Mapping[str, tuple[Sequence[Any], Any]]) -> None:
        self.path, self._functions = Path(beside).with_suffix(".c"), functions
        self._found: ctypes.CDLL | str | None = None

    def unavailable(self) -> str | None:
        """Say why it does not run here; None where it does."""
        if self._found is None:
            self.use(self._loaded())
        return self._found if isinstance(self._found, str) else None

    def use(self, found: ctypes.CDLL | str) -> None:
        """Take a library, or why there is none."""
        if not isinstance(found, str):
            for name, (arguments, returned) in self._functions.items():
                function = getattr(found, name)
                function.argtypes, function.restype = list(arguments), returned
        self._found = found

    def __getattr__(self, name: str) -> Any:
        """One of its functions; raises RuntimeError where it does not run."""
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(name)
        why = self.unavailable()
        if why is not None:
            raise RuntimeError(f"{self.path.name} does not run here: {why}")
        return getattr(self._found, name)

    def _loaded(self) -> ctypes.CDLL | str:
        """The library, kept where recast keeps things; or why there is none."""
        reason = why_not()
        if reason is not None:
            return reason
        folder = cache_directory()
        try:
            return load_library(self.path, None if folder is None else folder / "native")
        except OSError as error:
            return str(error)


def load_library(source: Path, folder: Path | None) -> ctypes.CDLL:
    """Load a C source as a library.

    Parameters
    ----------
    source
        One file of GNU C, which may use OpenMP.
    folder
        Where libraries are kept, by source, compiler and machine; None for a place that goes with the process.

    Raises
    ------
    OSError
        It does not compile or load; the compiler's words are told.
    """
    command = [str(compiler()), *_FLAGS]
    headers = sorted(_HEADERS.glob("*.h"))
    about = [
        source.read_bytes(),
        *(header.read_bytes() for header in headers),
        " ".join(command).encode(),
        _version(command[0]).encode(),
        _machine().encode(),
    ]
    digest = hashlib.sha256(b"\0".join(about)).hexdigest()[:20]
    kept = (folder or _own_folder()) / f"{source.stem}-{digest}.so"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:
            made = Path(place) / kept.name
            ran = subprocess.run(
                [*command, f"-I{_HEADERS}", str(source), "-o", str(made), *_openmp()],
                capture_output=True,
                text=True,
                check=False,
            )
            if ran.returncode:
                raise OSError(f"{command[0]} does not compile {source.name}: {ran.stderr.strip()[-500:]}")
            made.replace(kept)  # at once: another process may look for it
    return ctypes.CDLL(str(kept))


@functools.cache
def _own_folder() -> Path:
    place = tempfile.TemporaryDirectory(prefix="recast-native-")
    atexit.register(place.cleanup)  # or its finaliser would warn
    _own_folder.place = place  # type: ignore[attr-defined]  # removed with the process
    return Path(place.name)


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout


@functools.cache
def _machine() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _openmp() -> list[str]:
    """Link with the OpenMP that torch has loaded: of two in a process, each would have threads of its own."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    torch.get_num_threads()  # loads it
    loaded = sorted({line.split()[-1] for line in maps if "gomp" in line and line.endswith((".so.1", ".so.1.0.0"))})
    return ["-nodefaultlibs", "-lc", "-lm", loaded[0]] if loaded else []
