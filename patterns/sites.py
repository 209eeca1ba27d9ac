"""Nouns of matching: a `Site` worth rewriting, and a `Mismatch` that says why a place is none."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from recast.patterns.contraction import Contraction

__all__ = [
    "AttentionSite",
    "EmbeddingSite",
    "LinearSite",
    "MLPSite",
    "Mismatch",
    "MoESite",
    "NormSite",
    "Part",
    "Piece",
    "RotarySite",
    "Routing",
    "Site",
    "Use",
    "source_line",
]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why a place did not match.

    Parameters
    ----------
    name
        The weight concerned, or the graph value where no weight takes part.
    kind
        What the place is instead: ``embedding``, ``convolution``, ``product``; ``rest`` for a weight that is read in part ...
    parameters
        Elements of the weight concerned; 0 where none is.
    reason
        One sentence.
    node
        Name of the graph value reached last.
    where
        File and line of the model's own source, where known.
    flops
        Floating point operations of the place at the captured example's shapes.
    """

    name: str
    kind: str
    parameters: int
    reason: str
    node: str = ""
    where: str = ""
    flops: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a packed weight that the model uses as a matrix of its own: Q, K and V, or gate and up.

    Parameters
    ----------
    name
        ``q``, ``k``, ``v``, ``gate``, ``up``, or a number.
    rows
        Half-open row ranges, in the order in which the part's outputs come.
    """

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which matrix of a weight meets which row, where the model decides that as it runs: experts of a mixture.

    Parameters
    ----------
    kind
        ``gathered``: a row meets the matrix numbered by `index` at its place. ``grouped``: rows lie in runs, the run of matrix
        e ending before row ``index[e]``; rows beyond the last run give nothing.
    index
        Numbers of matrices, or ends of runs.
    letters
        Letters of the result that the dimensions of the numbers (or the rows in runs) have.
    y
        All letters of the result.
    count
        Matrices there are.
    nodes
        What stands between the weight and the product: the gather, and views of what it gives.
    """

    kind: str
    index: fx.Node
    letters: str
    y: str
    count: int
    nodes: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Use:
    """One product in the graph: ``y = contraction(x, weight) + bias``.

    Parameters
    ----------
    node
        The value replaced when this use is rewritten.
    product
        The product itself (differs from `node` where an addition that follows is the bias).
    x, weight
        Operands.
    contraction
        Which dimensions meet.
    bias
        A constant of ``out_features`` elements, or None.
    addend
        Something else that the operation adds (`addmm` with a matrix), or None.
    index
        For a batched weight, or one of experts, which of its matrices; else None.
    weight_shape
        Size of each letter of the contraction's weight; dimensions of size 1 that carry nothing are left out.
    routing
        For an expert, which rows meet its matrix; the contraction is then that of one matrix with all rows.
    """

    node: fx.Node
    product: fx.Node
    x: fx.Node
    weight: fx.Node
    contraction: Contraction
    bias: fx.Node | None = None
    addend: fx.Node | None = None
    index: int | None = None
    weight_shape: tuple[int, ...] = ()
    routing: Routing | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """A place worth rewriting.

    Parameters
    ----------
    name
        Name of the module or parameter it belongs to; unique in the program.
    weights
        Original names of the parameters it reads.
    """

    kind: ClassVar[str] = "site"
    name: str
    weights: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"kind": self.kind, "name": self.name, "weights": list(self.weights)}


@dataclasses.dataclass(frozen=True)
class LinearSite(Site):
    """A constant matrix that activations are multiplied by, with every use of it.

    Parameters
    ----------
    out_features, in_features
        Shape of the matrix as ``y = W x``.
    dtype
        Of the matrix as it is multiplied.
    uses
        Products with this matrix, in graph order.
    spelling
        How the first use is written: ``linear``, ``addmm``, ``conv2d`` ...
    parts
        For a packed weight, the matrices in it.
    tied
        Other uses of the same parameter (an embedding lookup) that keep the dense weight alive.
    flops
        Floating point operations of all uses at the captured example's shapes.
    where
        File and line of the model's own source, where known.
    """

    kind: ClassVar[str] = "linear"
    out_features: int = 0
    in_features: int = 0
    dtype: torch.dtype = torch.float32
    uses: tuple[Use, ...] = ()
    spelling: str = "linear"
    parts: tuple[Part, ...] = ()
    tied: tuple[str, ...] = ()
    flops: int = 0
    where: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    @property
    def parameters(self) -> int:
        """Elements of the matrix."""
        return self.out_features * self.in_features

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            **super().to_dict(),
            "shape": list(self.shape),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "spelling": self.spelling,
            "uses": len(self.uses),
            "parts": [{"name": p.name, "rows": [list(r) for r in p.rows]} for p in self.parts],
            "tied": list(self.tied),
            "parameters": self.parameters,
            "flops": self.flops,
            "where": self.where,
        }


@dataclasses.dataclass(frozen=True)
class Piece:
    """A linear site, or one named part of a packed one, in a role such as ``q`` or ``down``.

    Parameters
    ----------
    site
        The linear site.
    part
        Name of its part; empty for all of it.
    """

    site: LinearSite
    part: str = ""

    @property
    def name(self) -> str:
        """Name that a recipe or a plan knows it by."""
        return f"{self.site.name}.{self.part}" if self.part else self.site.name

    @property
    def weights(self) -> tuple[str, ...]:
        """Original names of the parameters."""
        return self.site.weights

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        rows = next((p.size for p in self.site.parts if p.name == self.part), self.site.out_features)
        return rows, self.site.in_features


@dataclasses.dataclass(frozen=True)
class _Structure(Site):
    """A site made of several operations of the graph.

    Parameters
    ----------
    node
        The value it gives.
    nodes
        Everything that computes it, in graph order, `node` last.
    pattern
        Name of the rule that found it.
    where
        File and line of the model's own source, where known.
    """

    node: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()
    pattern: str = ""
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; pieces by name, graph values left out."""
        found = super().to_dict()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in found or field.name in ("node", "nodes", "masks") or isinstance(value, fx.Node):
                continue
            found[field.name] = _plain(value)
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Piece):
        return value.name
    if isinstance(value, Site):
        return value.name
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value if not isinstance(v, fx.Node)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@dataclasses.dataclass(frozen=True)
class NormSite(_Structure):
    """A normalisation over the last dimensions, ``y = (x - mean) / sqrt(var + eps) * (offset + weight) + bias`` or without the mean.

    Parameters
    ----------
    flavour
        ``layer``, ``rms``, ``l2``, ``group`` or ``batch``.
    x
        What is normalised, before casts.
    weight, bias
        Constants of the graph, or None.
    offset
        Added to the weight: 1 for models that store ``weight - 1``.
    eps
        As the model gives it; where it holds the square from below, its root.
    features
        Elements normalised together.
    weight_first
        Whether the weight is applied in the wider dtype, before the cast back.
    eps_at
        Where eps enters: ``inside`` the root, ``outside`` (added to the root) or as a ``floor`` of it.
    groups
        Groups of features (or channels) normalised each for itself.
    axes
        Trailing dimensions normalised together (``layer``).
    mean, variance
        Statistics of a batch norm, constants.
    compute, product, between
        Dtypes, where the model chose them: of the statistics, of ``x / sqrt(...)``, of that where it meets the weight.
    """

    kind: ClassVar[str] = "norm"
    flavour: str = "layer"
    x: fx.Node | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    offset: float = 0.0
    eps: float = 0.0
    features: int = 0
    weight_first: bool = False
    eps_at: str = "inside"
    groups: int = 1
    axes: int = 1
    mean: fx.Node | None = None
    variance: fx.Node | None = None
    compute: torch.dtype | None = None
    product: torch.dtype | None = None
    between: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class RotarySite(_Structure):
    """A rotary position embedding of one tensor of queries or keys, ``y = x cos + rotate(x) sin``.

    Parameters
    ----------
    x, cos, sin
        Operands.
    layout
        ``half`` (the halves of a head are paired), ``interleaved`` (neighbours are), or ``unwoven`` (neighbours are paired, and
        the result holds all first elements of the pairs, then all second ones).
    rotated
        Features of a head that are rotated; the others pass.
    start
        Where the rotated features begin.
    inverse
        Whether it turns the other way.
    compute
        Dtype in which the model rotates, if another than that of `x`.
    """

    kind: ClassVar[str] = "rotary"
    x: fx.Node | None = None
    cos: fx.Node | None = None
    sin: fx.Node | None = None
    layout: str = "half"
    rotated: int = 0
    start: int = 0
    inverse: bool = False
    compute: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSite(_Structure):
    """Attention: ``o(normalise(scale q k + mask) v)`` with the linears around it.

    Parameters
    ----------
    q, k, v, o
        The linears that make queries, keys and values, and that take the result; None where there is none, the reason in `notes`.
    query, key, value
        What enters the core: (batch, heads, tokens, features).
    heads, kv_heads, head_dim, value_dim
        Sizes.
    scale
        What the product of `query` and `key` is multiplied by; factors that these have been given before are in them.
    mask
        ``none``, ``causal`` or ``sliding`` (each query is left exactly the keys up to its own place, or the last few of these),
        ``boolean`` or ``additive`` (any other), ``bias`` (made of weights), or ``unknown`` (a step that is not understood).
    mask_node
        The mask in the graph, if it is a value.
    masks
        Every mask in order, as ``(kind, value, fill)``; see `recast.patterns.attention.dialect.attention`.
    score_dtype
        In which the scores are normalised, if another than that of the query.
    grouped
        Whether the core itself serves several query heads with one key head.
    normaliser
        ``softmax``, ``sigmoid`` or ``relu``.
    softcap
        The scores are bounded as ``softcap tanh(scores / softcap)``; 0 if not.
    sinks
        Logits that take part in the normalisation and in nothing else.
    rotary, norms
        Names of the rotary and norm sites between the linears and the core.
    cross
        Whether keys come from another sequence than queries.
    cache
        Whether keys and values are joined with, or written into, a cache.
    notes
        What was not found, in words.
    """

    kind: ClassVar[str] = "attention"
    q: Piece | None = None
    k: Piece | None = None
    v: Piece | None = None
    o: Piece | None = None
    query: fx.Node | None = None
    key: fx.Node | None = None
    value: fx.Node | None = None
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    scale: float = 1.0
    mask: str = "none"
    mask_node: fx.Node | None = None
    masks: tuple[tuple[str, Any, Any], ...] = ()
    score_dtype: torch.dtype | None = None
    grouped: bool = False
    normaliser: str = "softmax"
    softcap: float = 0.0
    sinks: fx.Node | None = None
    rotary: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    cross: bool = False
    cache: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MoESite(_Structure):
    """A mixture of experts.

    Parameters
    ----------
    router
        The linear that scores experts.
    experts
        For each expert its linears by role: ``gate``, ``up``, ``down`` (``gate_up`` where they are one and taken apart), or
        ``in`` and ``out`` where something larger than an activation lies between.
    shared
        Those of experts that every token visits.
    top_k
        Experts a token visits; all of them for dense mixtures.
    scoring
        ``softmax``, ``sigmoid`` or ``none``.
    renormalised
        Whether the chosen weights are made to sum to one.
    corrected
        Whether a learned bias takes part in the choice.
    groups
        Groups of experts, of which some are chosen first; 0 if not.
    scale
        Factor of the chosen weights.
    dispatch
        How tokens reach experts: ``bmm``, ``grouped_mm``, ``loop``, ``einsum``, ``one_hot``.
    activation
        Of the experts.
    x
        What is routed.
    notes
        What is unusual, in words.
    """

    kind: ClassVar[str] = "moe"
    router: Piece | None = None
    experts: tuple[dict[str, Piece], ...] = ()
    shared: tuple[dict[str, Piece], ...] = ()
    top_k: int = 0
    scoring: str = "softmax"
    renormalised: bool = False
    corrected: bool = False
    groups: int = 0
    scale: float = 1.0
    dispatch: str = "loop"
    activation: str = ""
    x: fx.Node | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MLPSite(_Structure):
    """A feed-forward block: ``down(act(gate x) * up x)`` or ``down(act(up x))``; its matrices share a hidden width."""

    kind: ClassVar[str] = "mlp"
    gate: Piece | None = None
    up: Piece | None = None
    down: Piece | None = None
    activation: str = ""
    x: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class EmbeddingSite(_Structure):
    """A table that rows are looked up in; `head` is the linear that shares it."""

    kind: ClassVar[str] = "embedding"
    rows: int = 0
    features: int = 0
    head: Piece | None = None


def source_line(node: fx.Node) -> str:
    """``file:line`` of the model's own source for a value, as recorded by capture; empty if not known."""
    trace = node.meta.get("stack_trace")
    lines = [line.strip() for line in str(trace or "").splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/torch/" not in line] or lines
    if not own:
        return ""
    pieces = own[-1].split('"')
    number = pieces[2].replace(",", " ").split() if len(pieces) > 2 else []
    file = "/".join(pieces[1].split("/")[-3:]) if len(pieces) > 1 else ""
    return f"{file}:{number[1]}" if len(number) > 1 else file
