"""Cast: weights and activations in another floating dtype, reductions kept in float32."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from recast.passes.base import Context, Pass, Soundness
from recast.passes.dialect import inline_dialect
from recast.passes.meta import Evaluator
from recast.passes.module import OperatorModule
from recast.passes.recipe import COMPUTE_DTYPES
from recast.patterns.capture.canonical import canonicalise
from recast.patterns.constants import Constants
from recast.patterns.errors import PlanError, nearest
from recast.patterns.linear.spellings import is_matrix
from recast.patterns.program import Program, get_by_path, set_by_path

__all__ = ["Cast"]

aten = torch.ops.aten

# Sums over many terms; each runs in float32 and its result stays so until it meets an activation.
_REDUCTIONS = frozenset(
    {
        "mean", "sum", "nansum", "prod", "var", "std", "var_mean", "std_mean", "softmax", "_softmax", "log_softmax",
        "_log_softmax", "logsumexp", "cumsum", "cumprod", "norm", "linalg_vector_norm", "dist", "cosine_similarity",
    }
)  # fmt: skip
_LOOKUPS = frozenset({"embedding", "index", "index_select", "gather", "_embedding_bag", "embedding_bag"})
# Statistics may keep their dtype beside a narrower input: torch mixes the two, and a narrow variance costs accuracy.
_MIXED = frozenset({"batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"})
# Choose or move values without computing any; the dtype passes through.
_MOVES = frozenset(
    {"cat", "stack", "topk", "sort", "max", "min", "amax", "amin", "gather", "index", "index_select", "pad"}
)
_FILLS = frozenset({"masked_fill", "full", "full_like", "new_full", "fill", "where", "mul"})


@dataclasses.dataclass(frozen=True)
class Cast(Pass):
    """Compute in `dtype` (``bf16``, ``fp16``, ``fp32``) where activations flow; inputs and outputs keep their dtypes.

    The dtype that most matrix weights have is exchanged for `dtype`:

    - What has met a matrix weight is an *activation* and comes in `dtype`. What is computed from sizes, integers, raw
      inputs and small buffers only (positions, rotary tables, masks) stays as it is, and is cast where it meets an
      activation; a value beyond the range of `dtype` (a mask of -3.4e38) then becomes the largest finite one, and
      infinities stay.
    - Explicit reductions (mean, variance, softmax, norm ...) and the elementwise steps feeding only them run in
      float32; their results stay in float32 until they meet an activation. Fused ones (layer_norm, attention) do so
      inside torch.
    - What the model itself computes in a third dtype stays in that dtype.
    """

    name: ClassVar[str] = "cast"
    soundness: ClassVar[Soundness] = Soundness.BOUNDED
    ensures: ClassVar[tuple[str, ...]] = ("cast",)

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise PlanError(f"cast: dtype '{self.dtype}' is unknown; {nearest(str(self.dtype), COMPUTE_DTYPES)}")

    def run(self, program: Program, context: Context) -> Program:
        """Cast a copy of the program, spelled in ATen operations."""
        program = inline_dialect(program)
        wanted, main = COMPUTE_DTYPES[self.dtype], main_dtype(program)
        result = program.copy()
        if main == wanted:
            context.notes[self.name] = f"the weights are {self.dtype} already"
            return result
        work = _Cast(result, main, wanted)
        work.run()
        canonicalise(result)
        context.notes[self.name] = f"{work.changed} values of {main} now in {wanted}".replace("torch.", "")
        return result


def main_dtype(program: Program) -> torch.dtype:
    """The floating dtype that most elements of the matrix weights have; float32 for a program without matrices."""
    count: Counter[torch.dtype] = Counter()
    for weight in program.weights.values():
        if is_matrix(weight):
            count[weight.dtype] += weight.numel()
    for node in program.graph.find_nodes(op="call_module"):
        module = program.module.get_submodule(str(node.target))
        if isinstance(module, OperatorModule):
            count[module.structure.dtype] += math.prod(module.structure.shape)
    return count.most_common(1)[0][0] if count else torch.float32


def _op(node: fx.Node) -> str:
    """Name of an operation without namespace and overload."""
    return str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; finite values beyond its range become its ends."""
    cast, top = value.to(dtype), torch.finfo(dtype).max
    lost = torch.isinf(cast) & ~torch.isinf(value)
    return torch.where(lost, torch.where(value > 0, top, -top).to(dtype), cast) if bool(lost.any()) else cast


class _Cast:
    """One run of the pass over one program, in place."""

    def __init__(self, program: Program, main: torch.dtype, wanted: torch.dtype) -> None:
        self.program, self.main, self.wanted = program, main, wanted
        self.graph = program.graph
        # Reductions need float32, or what the model had if that is wider.
        self.wide = torch.promote_types(torch.float32, main) if wanted.itemsize < 4 else wanted
        self.constants = Constants(program)
        self.evaluator = Evaluator(program)
        self.original = {node: node.meta.get("val") for node in self.graph.nodes}
        self.order = list(self.graph.nodes)
        self.written = {name for _, kind, name in program.interface.mutations if kind == "weight"}
        self.active = self._active()
        self.widened = self._widened()
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.peaks: dict[fx.Node, float] = {}
        self.changed = 0

    def run(self) -> None:
        """Rewrite node by node, in order."""
        for node in self.order:
            if node.op == "call_module" and node in self.active:
                self._module(node)
            elif node.op == "call_function" and node in self.active:
                self._function(node)
            elif node.op == "output":
                self._output(node)
        self._weights()

    # What is an activation, and what feeds reductions only.

    def _active(self) -> set[fx.Node]:
        active: set[fx.Node] = set()
        for node in self.order:
            touched = any(n in active or self._matrix(n) for n in node.all_input_nodes)
            starts = node.op == "call_module" or _op(node) == "scaled_dot_product_attention"
            # A constant that is more than a view of a weight is computed from uncast operands, as before, then cast.
            fixed = node in self.constants and (not self._matrix(node) or self._merged(node))
            if node.op in ("call_module", "call_function") and (starts or touched) and not fixed:
                active.add(node)
        return active

    def _matrix(self, node: fx.Node) -> bool:
        """Whether a node is a matrix weight of the main dtype, or a view of one."""
        if node.op == "get_attr":
            value = get_by_path(self.program.module, str(node.target))
            held = isinstance(value, nn.Parameter) or any(self._multiplies(user) for user in node.users)
            return bool(is_matrix(value) and held and value.dtype == self.main and node.target not in self.written)
        view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        return node in self.constants and view and all(self._matrix(n) for n in node.all_input_nodes)

    def _merged(self, node: fx.Node) -> bool:
        """Whether a view of a weight goes into a constant that is more than a view."""
        return any(user in self.constants and (not self._matrix(user) or self._merged(user)) for user in node.users)

    def _multiplies(self, node: fx.Node) -> bool:
        # A table in a buffer that is only looked up (rotary, relative positions) is no weight.
        return (
            node.op == "call_function"
            and _op(node) not in _LOOKUPS
            and not self._pointwise(node)
            and not self._moves(node)
        )

    def _widened(self) -> set[fx.Node]:
        """Elementwise activations read by nothing but reductions: rounding them would undo what the reduction keeps."""
        widened: set[fx.Node] = set()
        if self.wide == self.wanted:
            return widened
        for node in reversed(self.order):
            if node in self.active and self._pointwise(node) and self._is_main(node) and node.users:
                widened |= {node} if all(self._reduces(user) or user in widened for user in node.users) else set()
        return widened

    def _reduces(self, node: fx.Node) -> bool:
        return _op(node) in _REDUCTIONS and self.wide != self.wanted

    def _is_main(self, node: fx.Node) -> bool:
        value = self.original.get(node)
        return isinstance(value, Tensor) and value.dtype == self.main

    @staticmethod
    def _pointwise(node: fx.Node) -> bool:
        target = node.target
        return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags

    @staticmethod
    def _moves(node: fx.Node) -> bool:
        target = node.target
        view = isinstance(target, torch._ops.OpOverload) and target.is_view
        copies = ("clone", "contiguous", "reshape", "_unsafe_view", "flatten", "repeat", "roll", "flip", "expand")
        return view or _op(node) in _MOVES or _op(node) in copies or node.target is operator.getitem

    # Rewriting.

    def _function(self, node: fx.Node) -> None:
        inputs = [
            n for n in node.all_input_nodes if _floats(n.meta.get("val")) and n.meta["val"].dtype in self._known(n)
        ]
        target = self._target(node, inputs)
        if target is not None:
            self._convert(node, inputs, target)
        if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
            narrow = self.wide if target == self.wide else self.wanted
            change = {n: narrow if a == self.main else a for n, a in enumerate(node.args) if isinstance(a, torch.dtype)}
            node.args = tuple(change.get(i, a) for i, a in enumerate(node.args))
            node.kwargs = {
                k: narrow if a == self.main and isinstance(a, torch.dtype) else a for k, a in node.kwargs.items()
            }
        if target == self.wanted and self._is_main(node):
            self._clamp(node)
        if _op(node) in ("rms_norm", "_fused_rms_norm") and self._is_main(node):
            self._fix_epsilon(node)
        self._settle(node, target)

    def _known(self, node: fx.Node) -> tuple[torch.dtype, ...]:
        """Dtypes in which an operand may be cast freely: those this pass itself deals out."""
        if not self._is_main(node):
            return ()  # the model's own choice of a third dtype
        return (self.main, self.wanted, self.wide)

    def _target(self, node: fx.Node, inputs: list[fx.Node]) -> torch.dtype | None:
        """Dtype in which an activation is computed; None to leave its operands as they come."""
        value = self.original[node]
        values = value if isinstance(value, list | tuple) else [value]
        if not any(_floats(v) and v.dtype == self.main for v in values):
            return None
        if self._reduces(node) or node in self.widened:
            return self.wide
        if self._pointwise(node) or self._moves(node):
            flowing = [n for n in inputs if n in self.active]
            if flowing and all(n.meta["val"].dtype == self.wide != self.wanted for n in flowing):
                return self.wide
        return self.wanted

    def _convert(self, node: fx.Node, inputs: list[fx.Node], target: torch.dtype) -> None:
        # An elementwise step where a reduction's result meets an activation runs in float32 and is rounded once.
        if self._pointwise(node) and any(n in self.active and n.meta["val"].dtype == self.wide for n in inputs):
            target = self.wide
        for operand in inputs:
            kept = _op(node) in _MIXED and operand.op == "get_attr"
            if operand.meta["val"].dtype != target and not kept:
                node.replace_input_with(operand, self._cast(operand, target))

    def _settle(self, node: fx.Node, target: torch.dtype | None) -> None:
        """Note the new type; round back where torch promoted the result."""
        node.meta["val"] = value = self.evaluator.value(node)
        before = self.original[node]
        if not _floats(value) or not _floats(before):
            return
        wish = target if before.dtype == self.main and target is not None else before.dtype
        self.changed += wish != before.dtype
        if value.dtype != wish:
            rounded = self._insert(node, node, wish)
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
            self.original[rounded] = before
            if node in self.active:
                self.active.add(rounded)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The value in another dtype, made once, right behind the value."""
        if (node, dtype) not in self.casts:
            source, last = node, node
            info = torch.finfo(dtype)
            narrows = info.max < torch.finfo(node.meta["val"].dtype).max
            if narrows and self._may_mask(node) and self._peak(node) > info.max:
                source = last = self._saturated(node, info)
            self.casts[node, dtype] = self._insert(last, source, dtype)
        return self.casts[node, dtype]

    def _may_mask(self, node: fx.Node) -> bool:
        """Whether a value that is no activation may be added to some: weights and what is multiplied need no guard."""
        if node.op == "get_attr" or node in self.active:
            return False
        return any(self._pointwise(u) or self._moves(u) or _op(u) == "scaled_dot_product_attention" for u in node.users)

    def _behind(self, node: fx.Node) -> fx.Node:
        """Where to insert what reads a node: placeholders stay together."""
        return self.program.inputs()[-1] if node.op == "placeholder" else node

    def _insert(self, after: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        with self.graph.inserting_after(self._behind(after)):
            made = self.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        return self._noted(made, source)

    def _saturated(self, node: fx.Node, info: torch.finfo) -> fx.Node:
        """Finite values beyond the range become its ends; infinities stay."""
        with self.graph.inserting_after(self._behind(node)):
            infinite = self._noted(self.graph.call_function(aten.isinf.default, (node,)), node)
        with self.graph.inserting_after(infinite):
            ends = self._noted(self.graph.call_function(aten.clamp.default, (node, info.min, info.max)), node)
        with self.graph.inserting_after(ends):
            return self._noted(self.graph.call_function(aten.where.self, (infinite, node, ends)), node)

    def _noted(self, made: fx.Node, source: fx.Node) -> fx.Node:
        made.meta = {k: v for k, v in source.meta.items() if k not in ("val", "recast_site")}
        made.meta["val"] = self.evaluator.value(made)
        return made

    def _peak(self, node: fx.Node) -> float:
        """An upper bound of the finite values of something that is no activation; infinity if unknown."""
        if node not in self.peaks:
            self.peaks[node] = self._peak_of(node)
        return self.peaks[node]

    def _peak_of(self, node: fx.Node) -> float:
        if node.op == "get_attr":
            value = get_by_path(self.program.module, str(node.target)).detach()
            finite = value[torch.isfinite(value)] if value.is_floating_point() else value
            return float(finite.abs().max()) if finite.numel() else 0.0
        known = node.meta.get("val")
        if isinstance(known, Tensor) and known.dtype == torch.bool:
            return 1.0
        name = _op(node)
        numbers = [abs(float(a)) for a in node.args if isinstance(a, int | float) and math.isfinite(a)]
        if name in ("cos", "sin", "tanh", "sigmoid", "softmax"):
            return 1.0
        if name in ("full", "full_like", "new_full", "masked_fill", "where", "scalar_tensor"):
            return max(
                [*numbers, *map(self._peak, node.all_input_nodes)] if name in ("masked_fill", "where") else numbers,
                default=0.0,
            )
        if name in ("zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones"):
            return 1.0
        inner = [self._peak(n) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if name == "mul":
            return math.prod([*inner, *numbers])
        if name in ("add", "sub", "rsub"):
            return sum([*inner, *numbers])
        if inner and (self._moves(node) or name in ("neg", "_to_copy", "abs", "clone", "expand")):
            return max(inner)
        return math.inf

    def _clamp(self, node: fx.Node) -> None:
        """Bring constants beyond the range of the dtype to its ends."""
        info = torch.finfo(self.wanted)

        def within(value: Any) -> Any:
            number = isinstance(value, float) or (
                isinstance(value, int) and not isinstance(value, bool) and _op(node) in _FILLS
            )
            if number and math.isfinite(value) and abs(value) > info.max:
                return math.copysign(info.max, value)
            return value

        node.args = tuple(within(a) for a in node.args)
        node.kwargs = {k: within(v) for k, v in node.kwargs.items()}

    def _fix_epsilon(self, node: fx.Node) -> None:
        """An absent eps means that of the input's dtype; keep the one the model was made with."""
        position = 3
        if len(node.args) <= position or node.args[position] is None:
            given = [*node.args, *[None] * (position - len(node.args))][:position]
            node.args = (*given, torch.finfo(self.main).eps)

    def _module(self, node: fx.Node) -> None:
        path = str(node.target)
        module = self.program.module.get_submodule(path)
        if isinstance(module, OperatorModule) and module.structure.dtype != self.wanted:
            set_by_path(self.program.module, path, OperatorModule(
                module.operator.to(self.wanted), module.site, module.form, module.order
            ))  # fmt: skip
        inputs = [n for n in node.all_input_nodes if self._is_main(n)]
        self._convert(node, inputs, self.wanted)
        self._settle(node, self.wanted)

    def _output(self, node: fx.Node) -> None:
        def restore(result: Any) -> Any:
            before = self.original.get(result) if isinstance(result, fx.Node) else None
            if not isinstance(before, Tensor) or result.meta["val"].dtype == before.dtype:
                return result
            return self._cast(result, before.dtype)

        node.args = (tuple(restore(r) for r in node.args[0]),)  # type: ignore[union-attr]

    def _weights(self) -> None:
        """Hold a weight in the new dtype where nothing reads it in another; its name stays."""
        by_name: dict[str, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            by_name.setdefault(str(node.target), []).append(node)
        for name, nodes in by_name.items():
            casts = {self.casts.get((node, self.wanted)) for node in nodes}
            if None in casts or name in self.written or any(u not in casts for node in nodes for u in node.users):
                continue
            value = get_by_path(self.program.module, name)
            held = _saturated(value.detach(), self.wanted)
            set_by_path(
                self.program.module, name, nn.Parameter(held, False) if isinstance(value, nn.Parameter) else held
            )
            for node in nodes:
                cast = self.casts[node, self.wanted]
                node.meta["val"] = cast.meta["val"]
                cast.replace_all_uses_with(node)
                self.graph.erase_node(cast)
