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
from pathlib import Path

import torch

from recast.kernels.kept import cache_directory

__all__ = ["compiler", "library_of", "load_library", "why_not"]

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


@functools.cache
def library_of(source: Path) -> ctypes.CDLL | str:
    """A C source as a library, kept where recast keeps things; or why there is none."""
    reason = why_not()
    if reason is not None:
        return reason
    folder = cache_directory()
    try:
        return load_library(source, None if folder is None else folder / "native")
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
