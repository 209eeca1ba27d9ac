"""What `benchmarks.fit_time` fits, what it stands beside, and what it is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINE = "torch.linalg.svd"
COPY = "copy of the weight"
# The same method elsewhere: by name the modules it needs.
PEERS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "torch.svd_lowrank, rank 512": (),
    "scikit-learn randomized_svd, rank 512": ("sklearn",),
    COPY: (),
    "onnxruntime int4, groups of 128": ("onnxruntime", "onnx"),
    "nncf int4, groups of 128": ("nncf", "openvino"),
    "nncf int4, groups of 128, gptq + data": ("nncf", "openvino"),
}

_EXACT = "low_rank(rank=512, solver='exact') + data"
_SKETCHED = "low_rank(rank=512, solver='randomized') + data"
_GPTQ = "int4(group=128, rounding='gptq') + data"
_SPARSEGPT = "sparse24(method='sparsegpt') + data"
# In the order of the table; a registered form that is not here is fitted with its first example, with data.
FITS = (
    "low_rank(ratio=0.5)", "low_rank(ratio=0.5) + data", _EXACT, _SKETCHED, "asvd(ratio=0.5) + data", "fwsvd(ratio=0.5) + data",
    "welore(0.5) + data",
    "shared_basis(ratio=0.5, group=2) + data", "shared_atoms(1, 128) + data",
    "sparse24(method='magnitude')", "sparse24(method='wanda') + data", "sparse24(method='nowag') + data", _SPARSEGPT,
    "sparse_nm(4, 8, method='sparsegpt') + data", "unstructured(density=0.5, method='sparsegpt') + data",
    "column_sparse(density=0.5) + data", "armor(block=128, iterations=30) + data",
    "monarch(blocks=4) + data", "block_shuffle(blocks=4) + data", "block_dense(blocks=2, ratio=0.5) + data",
    "block_diagonal(4) + data", "permuted_block_diagonal(4) + data", "blast(blocks=16, ratio=0.5, iterations=10) + data",
    "sparse_dictionary(ratio=0.8, iterations=1) + data", "kmeans(bits=3) + data", "product_quantization(bits=8, dim=4) + data",
    "sparse_low_rank(ratio=0.5, density=0.03) + data", "lq(64, turns=5) + data", "lorc(8) + data",
    "llm_int8 + data", "smoothquant + data", "int8", "int8(activations=true)", "int4", "int4(clip=false)", "int4 + data",
    "int4(group=128)", _GPTQ, "int4(group=128, rounding='quantease') + data", "awq + data", "int3(group=128)", "int2(group=64)", "nf4",
    "nf4(double=true)", "fp4", "fp8", "minifloat(2, 1)", "teal(0.5) + data", "wina(0.5)", "low_rank(ratio=0.5) | int8 + data",
)  # fmt: skip
_LEFT_OUT = ("dense", "diagonal", "sparse", "permutation")  # nothing to fit


@dataclass(frozen=True)
class Mark:
    """What a row is held to.

    Parameters
    ----------
    row, shape
        Which.
    seconds
        At most so many.
    near
        Another row, from whose error on the data it may be off by `within`.
    times
        Another row, of whose seconds `seconds` is a multiple.
    """

    row: str
    shape: str
    seconds: float
    near: str = ""
    within: float = 0.01
    times: str = ""


MARKS = (
    Mark(_EXACT, "4096x11008", 60.0),
    Mark(_SKETCHED, "4096x11008", 10.0, near=_EXACT),
    Mark(_GPTQ, "4096x4096", 30.0),
    Mark(_SPARSEGPT, "4096x4096", 30.0),
    # At the speed of memory: it reads the weight once and writes an eighth of it.
    Mark("int4(clip=false)", "4096x11008", 3.0, times=COPY),
)


def texts() -> list[str]:
    """Every fit: those of the table, then registered forms that are not there."""
    from recast.passes.forms import Form, forms

    def names(text: str) -> set[str]:
        return {name for name in forms() if name in str(Form.parse(split(text)[0]))}

    there = {name for text in FITS for name in names(text)}
    more = [
        f"{cls.examples((1024, 1024))[0]} + data"
        for name, cls in forms().items()
        if name not in there and name not in _LEFT_OUT and cls.examples((1024, 1024))
    ]
    return [*FITS, *more]


def split(text: str) -> tuple[str, bool]:
    """Text of the form, and whether it is fitted to data."""
    return text.replace(" + data", ""), " + data" in text


def key(row: Mapping[str, Any]) -> tuple[str, str]:
    """What names a row."""
    return row["name"], "x".join(map(str, row["shape"]))


def held(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each mark and whether it is met; marks whose rows are not there are left out."""
    known = {key(row): row for row in rows if "seconds" in row}
    found = []
    for mark in MARKS:
        row = known.get((mark.row, mark.shape))
        if row is None:
            continue
        most = mark.seconds
        if mark.times:
            if (other := known.get((mark.times, mark.shape))) is None:
                continue
            most *= other["seconds"]
        entry = {"row": mark.row, "shape": mark.shape, "seconds": row["seconds"], "at most": most}
        met = row["seconds"] <= most
        if mark.near and (other := known.get((mark.near, mark.shape))) is not None:
            excess = row["output_error"] / other["output_error"] - 1
            entry |= {"error above": mark.near, "excess": excess, "within": mark.within}
            met = met and excess <= mark.within
        found.append(entry | {"met": met})
    found += [_memory(row) for row in rows if "seconds" in row and row["name"] not in PEERS]
    return [entry for entry in found if "seconds" in entry or not entry["met"]]


def _memory(row: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory is held to four times the weight in float32, and its Gram matrix in float64 where there is data."""
    weights = row.get("matrices", 1)
    gram = row["shape"][1] ** 2 * 8 if split(row["name"])[1] else 0
    limit = weights * (4 * row["weight_bytes"] + gram)
    name, shape = key(row)
    return {
        "row": name,
        "shape": shape,
        "peak bytes": row["peak_bytes"],
        "at most": limit,
        "met": row["peak_bytes"] <= limit,
    }
