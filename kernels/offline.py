"""Triton kernels compiled without the device they are for, and what the compiler made of them.

Registers, spills, shared memory and instructions are read from the machine code: by the CUDA tools in Triton's wheel, and from
the metadata of AMD's assembly.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["TARGETS", "Case", "Resources", "cases", "compile_case", "compile_offline", "digest", "target_named"]

# Name, backend, architecture, threads of a warp, bytes of shared memory that a block may have.
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 << 10),
    "sm_90": ("cuda", 90, 32, 227 << 10),
    "sm_100": ("cuda", 100, 32, 227 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a machine.

    Attributes
    ----------
    registers
        Of a thread.
    spilled
        Bytes of a thread that did not fit its registers.
    shared, shared_limit
        Bytes of shared memory of a block, and what the machine allows.
    matrix
        Instructions for the matrix units, by mnemonic.
    loads
        Loads from global memory, by bytes for each thread.
    instructions
        In all of the code.
    loop
        In the innermost loop that holds most of them, None where no loop was found.
    multiplies
        Whether it is meant to use the matrix unit.
    """

    registers: int
    spilled: int
    shared: int
    shared_limit: int
    matrix: dict[str, int]
    loads: dict[int, int]
    instructions: int
    loop: int | None = None
    asm: str = field(default="", repr=False, compare=False)
    multiplies: bool = True

    def to_dict(self) -> dict[str, Any]:
        """All but the code itself, JSON-able."""
        found = asdict(self)
        del found["asm"]
        return found | {"clean": self.clean}

    @property
    def clean(self) -> bool:
        """Whether nothing spills, shared memory fits, the matrix unit is used, and 16 bytes are loaded at a time."""
        return (
            not self.spilled
            and self.shared <= self.shared_limit
            and (bool(self.matrix) or not self.multiplies)
            and max(self.loads, default=0) >= 16
        )


@dataclass(frozen=True)
class Case:
    """One configuration of a kernel.

    Attributes
    ----------
    kernel
        ``module:function``.
    name
        For tables.
    signature, constants, aligned, num_warps, num_stages
        As `compile_offline` takes them.
    multiplies
        Whether it uses the matrix unit; what only moves does not.
    weights
        Numbers of the streaming operand that a thread handles in one turn of the innermost loop, to count instructions by.
    """

    kernel: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    weights: int = 0
    multiplies: bool = True


def cases(target: str) -> Iterator[Case]:
    """Every configuration of every kernel for a target: what the files `resources.py` of `recast.kernels` list."""
    package = importlib.import_module("recast.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        name = f"recast.kernels.{found.name}.resources"
        if found.ispkg and importlib.util.find_spec(name) is not None:
            yield from importlib.import_module(name).cases(target)


def compile_case(case: Case, target: str) -> Resources:
    """Compile one configuration for a target."""
    module, _, function = case.kernel.partition(":")
    found = compile_offline(
        getattr(importlib.import_module(module), function),
        case.signature,
        case.constants,
        target,
        aligned=case.aligned,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
    )
    return replace(found, multiplies=case.multiplies)


def digest(case: Case, target: str) -> str:
    """What a compilation rests on but for the compiler: the source of a kernel and of all it calls, and the configuration."""
    module, _, function = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    about = (kernel.cache_key, *(sorted(part.items()) for part in (case.signature, case.constants)), case.aligned)
    words = repr((*about, case.num_warps, case.num_stages, case.multiplies, case.weights, target))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def target_named(name: str) -> Any:
    """Triton's target of one of `TARGETS`."""
    from triton.backends.compiler import GPUTarget

    backend, architecture, warp, _ = TARGETS[name]
    return GPUTarget(backend, architecture, warp)


def compile_offline(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    aligned: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 1,
) -> Resources:
    """Compile a kernel for a machine that need not be here.

    Parameters
    ----------
    kernel
        A function under `triton.jit` (not interpreted).
    signature
        Type of each argument that is passed when the kernel runs: "*bf16", "i32" ...
    constants
        Values of the others.
    target
        One of `TARGETS`.
    aligned
        Arguments that are multiples of 16, addresses in bytes and sizes in elements.
    num_warps, num_stages
        Triton's options.

    Raises
    ------
    KeyError
        There is no such target.
    """
    import triton
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, attributes)
    backend, _, _, limit = TARGETS[target]
    # Given, as its default is asked of a device.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target_named(target), options=options)
    shared = int(compiled.metadata.shared)
    if backend == "cuda":
        return _cuda(compiled.asm["cubin"], shared, limit)
    return _amd(compiled.asm["amdgcn"], shared, limit)


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _cuda(cubin: bytes, shared: int, limit: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = _tool("cuobjdump", "-res-usage", str(file)), _tool("nvdisasm", "-c", str(file))
    registers, stack = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    lines = [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line) or line.startswith(".L")]
    body = [line for line in lines if not line.startswith(".L")]
    spilled = stack if re.search(r"\b(STL|LDL)\b", code) else 0
    matrix = Counter(re.findall(r"\b((?:H|I|Q|OMMA|UTC\w*|W)G?MMA[\w.]*)", code))
    widths = Counter(_width(found) for found in re.findall(r"\bLDG\.([\w.]*)", code))
    copies = Counter(_width(found) for found in re.findall(r"\bLDGSTS\.([\w.]*)", code))
    return Resources(registers, spilled, shared, limit, dict(matrix), dict(widths + copies), len(body), _loop(lines), code)  # fmt: skip


def _width(modifiers: str) -> int:
    found = re.search(r"\b(64|128)\b", modifiers)
    small = re.search(r"\b[US](8|16)\b", modifiers)
    return int(found[1]) // 8 if found else int(small[1]) // 8 if small else 4


def _loop(lines: list[str]) -> int | None:
    """Count instructions from a label to the last jump back to it; of all such pieces without another inside, the largest."""
    labels: dict[str, int] = {}
    spans = []
    for at, line in enumerate(lines):
        if line.startswith(".L"):
            labels[line.split(":")[0].strip()] = at
        jump = re.search(r"\bBRA\b.*`\(([.\w]+)\)", line)
        if jump and jump[1] in labels and labels[jump[1]] < at - 1:
            spans.append((labels[jump[1]], at))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return max((sum(not line.startswith(".L") for line in lines[a:b]) for a, b in inner), default=None)


def _amd(text: str, shared: int, limit: int) -> Resources:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    spilled = number("private_segment_fixed_size") if number("vgpr_spill_count") else 0
    matrix = Counter(re.findall(r"\b(v_mfma_\w+)", text))
    loads = Counter(4 * int(n or 1) for n in re.findall(r"\b(?:global|buffer)_load_dword(?:x(\d))?\b", text))
    loads += Counter(1 for _ in re.findall(r"\b(?:global|buffer)_load_u?byte", text))
    code = [line for line in text.splitlines() if re.match(r"\s+[a-z]\w+\b(?!:)", line)]
    return Resources(number("vgpr_count"), spilled, shared, limit, dict(matrix), dict(loads), len(code), None, text)
