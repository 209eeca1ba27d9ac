"""The forms that `benchmarks.fidelity` compares."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.fidelity_budget import BUDGETS, Family

CUTS = (0.9, 0.8, 0.7, 0.6)  # where low rank is published


def _ratios(text: str, most: float = 1.0) -> tuple[str, ...]:
    return tuple(text.format(i / 200) for i in range(2, int(most * 200) + 1))


def _numbers(text: str, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(text.format(number) for number in numbers)


def _fixed(name: str, kind: str, text: str, *, data: bool = True) -> Family:
    return Family(name, kind, (text,), (), data)


def _low_rank() -> list[Family]:
    both = (*CUTS, *BUDGETS)
    found = [
        Family("svd", "low rank", _ratios("low_rank(ratio={})"), both, data=False),
        Family("fwsvd", "low rank", _ratios("fwsvd(ratio={})"), both),
        Family("asvd", "low rank", _ratios("asvd(ratio={})"), both),
        Family("low_rank", "low rank", _ratios("low_rank(ratio={})"), both),
        Family(
            "sparse_dictionary",
            "low rank",
            _ratios("sparse_dictionary(ratio={}, iterations=3)"),
            (*CUTS[1:], 0.5, 0.25),
        ),
        Family("low_rank, in order", "low rank", _ratios("low_rank(ratio={})"), (*CUTS, 0.5), ordered=True),
        Family("shared_basis", "low rank", _ratios("shared_basis(ratio={}, group=2)"), (0.8, *BUDGETS)),
        Family("low_rank | int8", "low rank", _ratios("low_rank(ratio={}) | int8", 2.0)),
        Family("low_rank | int4", "low rank", _ratios("low_rank(ratio={}) | int4(group=32)", 2.0), BUDGETS[2:]),
        Family("sparse_low_rank", "low rank", _ratios("sparse_low_rank(ratio={}, density=0.03)"), (0.75, 0.5, 0.25)),
    ]
    for share in CUTS:  # blocks as a whole, beside their matrices one by one
        # A little less than the share, as widths are rounded; heads are 32 wide in all of the models.
        hidden, values = f"nystrom(ratio={share - 0.002:.3f})", f"svd_vo(ratio={int(share * 32) / 32})"
        found += [
            Family("nystrom, MLPs", "blocks", (hidden,), (share,), scope="mlp", block="mlp"),
            Family("low_rank, MLPs", "blocks", _ratios("low_rank(ratio={})"), (share,), scope="mlp"),
            Family("svd_vo, values", "blocks", (values,), (share,), scope="values", block="attention"),
            Family("low_rank, values", "blocks", _ratios("low_rank(ratio={})"), (share,), scope="values"),
        ]
    for share in (0.8, 0.7):  # what the attention of a model is cut to, its MLPs left as they are
        found += [
            Family("low_rank, attention", "attention", _ratios("low_rank(ratio={})"), (share,), scope="attention"),
            Family("shared_basis, attention", "attention", _ratios("shared_basis(ratio={}, group=2)"), (share,), scope="attention"),
        ]  # fmt: skip
        for atoms in (1, 2, 3, 4):
            settings = _numbers(f"shared_atoms({atoms}, {{}})", range(1, 128))
            found.append(
                Family(f"shared_atoms({atoms}), attention", "attention", settings, (share,), scope="attention")
            )
    return found


def _structured() -> list[Family]:
    return [
        Family("monarch", "structured", _numbers("monarch(blocks=4, rank={})", range(1, 65))),
        Family("block_shuffle", "structured", _numbers("block_shuffle(blocks=2, rank={})", range(1, 129))),
        Family("block_dense", "structured", _ratios("block_dense(blocks=2, ratio={})")),
        Family("blast", "structured", _ratios("blast(blocks=16, ratio={}, iterations=15)"), (0.75, 0.5, 0.25)),
        Family("block_diagonal", "structured", _numbers("block_diagonal({})", (2, 4, 8)), (0.5, 0.25, 0.125)),
        Family("permuted_block_diagonal", "structured", _numbers("permuted_block_diagonal({})", (2, 4, 8)), (0.75, 0.375, 0.25)),
    ]  # fmt: skip


def _sparse() -> list[Family]:
    found = []
    for method in ("magnitude", "wanda", "sparsegpt", "nowag"):
        data = method != "magnitude"
        found.append(_fixed(f"2:4 {method}", "sparse", f"sparse24(method='{method}')", data=data))
    found += [
        Family("2:4 sparsegpt, in order", "sparse", ("sparse24(method='sparsegpt')",), (), ordered=True),
        _fixed("2:4 armor", "sparse", "armor(block=32, iterations=60)"),
        _fixed("4:8 sparsegpt", "sparse", "sparse_nm(4, 8, method='sparsegpt')"),
        _fixed("2:4 sparsegpt | int4", "sparse", "sparse24(method='sparsegpt') | int4(group=64)"),
    ]
    for method in ("magnitude", "wanda", "sparsegpt"):
        settings = _ratios("unstructured(density={}, " + f"method='{method}')")
        found.append(Family(f"unstructured {method}", "sparse", settings, data=method != "magnitude"))
    return [*found, Family("column_sparse", "sparse", _ratios("column_sparse(density={})"))]


def _quantized() -> list[Family]:
    found = [_fixed("int8", "quantized", "int8", data=False)]
    for bits, settings in (
        (4, "group=128, symmetric=false"),
        (3, "group=128"),
        (3, "group=32"),
        (2, "group=64"),
        (2, "group=32"),
    ):
        group = settings.partition("=")[2].partition(",")[0]
        label = (
            f"int{bits}" if (bits, group) in ((4, "128"), (3, "128"), (2, "64")) else f"int{bits}, groups of {group}"
        )
        found.append(_fixed(f"{label} nearest", "quantized", f"int{bits}({settings})", data=False))
        found.append(_fixed(f"{label} gptq", "quantized", f"int{bits}({settings}, rounding='gptq')"))
        if "," not in label:
            found.append(_fixed(f"{label} quantease", "quantized", f"int{bits}({settings}, rounding='quantease')"))
            found.append(_fixed(f"{label} awq", "quantized", f'awq(base="int{bits}({settings})")'))
    found += [
        Family("int3 gptq, in order", "quantized", ("int3(group=128, rounding='gptq')",), (), ordered=True),
        _fixed("fp4, searched", "quantized", "fp4(search=true)"),
        _fixed("int4 awq, gptq", "quantized", "awq(base=\"int4(group=128, symmetric=false, rounding='gptq')\")"),
    ]
    for bits, plain in ((3, "int3(group=32)"), (2, "int2(group=32)")):
        base = f"int{bits}(group={128 if bits == 3 else 64}{{}})"
        for name, rounding in ((f"lorc int{bits}", ""), (f"lorc int{bits} gptq", ", rounding='gptq'")):
            text = f'lorc({{}}, base="{base.format(rounding)}")'
            found.append(Family(name, "quantized", _numbers(text, range(1, 65)), (plain, 0.375)))
        text = f"lq({{}}, base='nf{bits}(double=true)', turns=8)"
        found.append(Family(f"lq nf{bits}", "quantized", _numbers(text, range(1, 65)), (plain, 0.375)))
        rounded = f"lq({{}}, base='{base.format('')}', turns=8)"
        found.append(Family(f"lq int{bits}", "quantized", _numbers(rounded, range(1, 65)), (plain,)))
        fisher = text.replace("turns=8", "turns=8, weighting='fisher'")
        found.append(Family(f"lq nf{bits} fisher", "quantized", _numbers(fisher, range(1, 65)), (plain,)))
    named = (
        "nf4",
        "nf4(double=true)",
        "nf3(double=true)",
        "nf2(double=true)",
        "fp4",
        "fp4(kind='bitsandbytes')",
        "fp8",
    )
    found += [_fixed(text, "quantized", text, data=False) for text in named]
    vectors = ((8, 2), (7, 2), (6, 2), (8, 4), (7, 4), (6, 4))
    floats = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3))
    codes = [f"product_quantization(bits={b}, dim={d})" for b, d in vectors]
    return [
        *found,
        Family("kmeans", "quantized", _numbers("kmeans(bits={})", range(1, 9)), (0.75, 0.375, 0.25, 0.2, 0.14)),
        Family("product_quantization", "quantized", tuple(codes), (0.25, 0.15)),
        Family("minifloat", "quantized", tuple(f"minifloat({e}, {m})" for e, m in floats), (0.6, 0.5, 0.4, 0.3, 0.22)),
    ]


def _activations() -> list[Family]:
    texts = {
        "int8, rounded inputs": "int8(activations=true)",
        "fp8, rounded inputs": "fp8(activations=true)",
        "fp4, rounded inputs": "fp4(group=64, activations=true)",
        "smoothquant": "smoothquant",
        "llm_int8": "llm_int8",
        **{f"{name}({share})": f"{name}({share})" for name in ("teal", "wina") for share in (0.25, 0.5)},
    }
    return [_fixed(name, "activations", text) for name, text in texts.items()]


def _experts() -> list[Family]:
    """Of the mixture alone: what the experts of a layer share."""
    one = ("shared_atoms(1)",)
    smaller = [
        family
        for share in CUTS
        for family in (
            Family(
                "camera, experts", "experts", (f"camera(ratio={share:.3f})",), (share,), scope="experts", block="moe"
            ),
            Family("low_rank, experts", "experts", _ratios("low_rank(ratio={})"), (share,), scope="experts"),
        )
    ]
    return [
        *smaller,
        Family("experts averaged", "experts", one, (), scope="experts"),
        Family("experts merged to one", "experts", ("merged(1)",), (), scope="experts"),
        Family("experts merged to half", "experts", ("merged(3)",), (), scope="experts"),
        Family("union svd of experts", "experts", _ratios("shared_basis(ratio={}, group=0)"), one, scope="experts"),
        Family("low_rank of experts", "experts", _ratios("low_rank(ratio={})"), one, scope="experts"),
    ]


# What the published orders need, soonest done first: a run that is cut short has that.
STAGES = (
    r"dense|svd|fwsvd|asvd|low_rank|low_rank, in order|2:4 (magnitude|wanda|sparsegpt|nowag)",
    r"int\d.*|.*experts.*",
    r".*, (MLPs|values|attention)",
    r"lorc.*|lq.*",
    r"2:4 armor",
    r"sparse_dictionary",
)
FAMILIES: tuple[Family, ...] = (
    Family("dense", "dense", ("dense",), ()),
    *_low_rank(),
    *_sparse(),
    *_quantized(),
    *_structured(),
    *_activations(),
    *_experts(),
)


def stage(family: Family) -> int:
    """Say how late a family is measured."""
    return next((i for i, names in enumerate(STAGES) if re.fullmatch(names, family.name)), len(STAGES))
