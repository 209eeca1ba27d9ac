"""Verification after every pass: structure, metadata, interface, ownership, numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.base import Context, Pass, Soundness
from recast.passes.errors_of import rounding_of
from recast.passes.forms.gated import gates, ungated
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import without_grids
from recast.passes.forms.rounded_inputs import rounds_to_floats, unrounded
from recast.passes.meta import fake_values
from recast.passes.module import OperatorModule
from recast.passes.modules.check import check_blocks
from recast.passes.report import fidelity
from recast.patterns.constants import Constants
from recast.patterns.derivation import Derivation
from recast.patterns.errors import VerificationError
from recast.patterns.linear.find import product_flops
from recast.patterns.linear.packing import size_hint
from recast.patterns.printer import type_text
from recast.patterns.program import Program

__all__ = ["bounded_bound", "check", "exact_bound", "inputs_of", "probe_inputs", "product_depth"]


def exact_bound(dtype: torch.dtype) -> float:
    """Largest relative error that an exact pass may cause in a whole model's output.

    An exact rewrite changes the order of summation only. In float32 and float64 one product of K terms differs by about
    sqrt(K) units in the last place; 2**10 units leave room for K up to 2**16 and some dozens of layers (1.2e-4 in
    float32). The 16-bit types add up in float32 and round once a product, so 2**4 units are plenty.
    """
    info = torch.finfo(dtype)
    return float(info.eps) * (2**10 if info.bits >= 32 else 2**4)


def bounded_bound(program: Program, dtype: torch.dtype) -> float:
    """Largest relative error that computing a whole model in another dtype may cause in its output.

    A product rounds its two operands and its result, each by eps / 2, and the elementwise steps around it some more:
    about one eps a product. Errors of different layers are independent, so they grow with the square root of the depth,
    counted in products along the deepest path. The constant 8 leaves room for layers that amplify what comes in.
    """
    return 8 * float(torch.finfo(dtype).eps) * math.sqrt(max(1, product_depth(program)))


def product_depth(program: Program) -> int:
    """Number of matrix products along the deepest path of a program; attention counts as two."""
    depth: dict[Any, int] = {}
    deepest = 0
    for node in program.graph.nodes:
        own = 1 if node.op == "call_module" else min(1, product_flops(node))
        if getattr(node.target, "_opname", "") == "scaled_dot_product_attention":
            own = 2
        depth[node] = own + max((depth[n] for n in node.all_input_nodes), default=0)
        deepest = max(deepest, depth[node])
    return deepest


def coarsest_dtype(*programs: Program) -> torch.dtype:
    """The floating dtype with the largest eps that any value of some programs has; float32 if there is none."""
    found = {
        value.dtype
        for program in programs
        for node in program.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()
    }
    return max(found, key=lambda dtype: float(torch.finfo(dtype).eps), default=torch.float32)


def check(before: Program, after: Program, step: Pass, context: Context) -> dict[str, Any]:
    """Check what a pass must leave intact.

    Returns
    -------
    dict
        What was checked, with the figures.

    Raises
    ------
    VerificationError
        Naming the place.
    """
    _structure(after)
    _metadata(after)
    _interface(before, after)
    owned = _ownership(before, after, step)
    numbers = _numbers(before, after, step, context)
    return {"soundness": step.soundness.value, "verified": True, **owned, **numbers}


def _structure(program: Program) -> None:
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is malformed: {error}") from error
    for node in program.graph.nodes:
        for operand in node.all_input_nodes:
            if node not in operand.users:
                raise VerificationError(f"'{node.name}' uses '{operand.name}', which does not know it")


def _metadata(program: Program) -> None:
    for node, value in fake_values(program).items():
        known = node.meta.get("val")
        if not isinstance(value, Tensor) or node.op == "placeholder":
            continue
        if not isinstance(known, Tensor) or known.dtype != value.dtype or not _same_shape(known, value):
            raise VerificationError(f"'{node.name}' is noted as {type_text(known)} but computes {type_text(value)}")


def _same_shape(a: Tensor, b: Tensor) -> bool:
    # Equal in the example is what can be decided without adding guards to the shape environment.
    return a.ndim == b.ndim and all(size_hint(x) == size_hint(y) for x, y in zip(a.shape, b.shape, strict=True))


def _interface(before: Program, after: Program) -> None:
    names = [[n.name for n in p.inputs()] for p in (before, after)]
    if names[0] != names[1]:
        raise VerificationError(f"inputs changed from {names[0]} to {names[1]}")
    outputs = [next(iter(p.graph.find_nodes(op="output"))).args[0] for p in (before, after)]
    if len(outputs[0]) != len(outputs[1]):
        raise VerificationError(f"the number of outputs changed from {len(outputs[0])} to {len(outputs[1])}")
    for i, (a, b) in enumerate(zip(*outputs, strict=True)):
        old, new = (v.meta.get("val") if hasattr(v, "meta") else v for v in (a, b))
        if isinstance(old, Tensor) and (old.dtype != new.dtype or not _same_shape(old, new)):
            raise VerificationError(f"output {i} changed from {type_text(old)} to {type_text(new)}")


def _ownership(before: Program, after: Program, step: Pass) -> dict[str, int]:
    """Each original parameter is kept as it is, or replaced by an operator, or dropped because nothing reads it.

    It may also be made anew of named old ones: each such weight has its formula in ``program.derived``.
    """
    old, new = before.weights, after.weights
    made = _made(before, after) if step.soundness is not Soundness.BOUNDED else {}
    if extra := sorted(set(new) - set(old) - set(made)):
        raise VerificationError(f"weights {extra} appeared from nowhere")
    for name, weight in new.items():
        if name in made:
            continue
        same = weight.shape == old[name].shape
        if step.soundness is not Soundness.BOUNDED:
            same = same and weight.data_ptr() == old[name].data_ptr() and weight.dtype == old[name].dtype
        if not same:
            raise VerificationError(f"weight '{name}' is another tensor than before")
    if lost := sorted(name for name in before.derived if name in new and name not in after.derived):
        raise VerificationError(f"weights {lost} were made of others, which is no longer on record")
    gone = set(old) - set(new)
    replaced = {name for name in gone if after.successors_of(name)} if made else gone
    return {
        "weights_kept": len(new) - len(made),
        "weights_replaced": len(replaced),
        **({"weights_made": len(made), "weights_dropped": len(gone - replaced)} if made else {}),
    }


def _made(before: Program, after: Program) -> dict[str, Derivation]:
    """Weights that a pass made: on record as such, of the shape their formula gives, and of weights there were."""
    old, new = before.weights, after.weights
    made = {n: d for n, d in after.derived.items() if n in new and before.derived.get(n) != d}
    known = set(old) | {source for d in before.derived.values() for source in d.sources}
    for name, derivation in made.items():
        if unknown := [source for source in derivation.sources if source not in known]:
            raise VerificationError(f"weight '{name}' is said to be made of {unknown}, which the program never had")
        if tuple(new[name].shape) != derivation.shape:
            raise VerificationError(
                f"weight '{name}' is {type_text(new[name])}, its formula {derivation} gives {list(derivation.shape)}"
            )
    return made


def _numbers(before: Program, after: Program, step: Pass, context: Context) -> dict[str, float]:
    probe = inputs_of(before, context)
    with torch.no_grad():
        reference = context.outputs(before, lambda: before.module(*_fresh(probe)))
        found = context.outputs(after, lambda: after.module(*_fresh(probe)))
    coarsest = coarsest_dtype(before, after)
    bounds = {Soundness.EXACT: exact_bound(coarsest), Soundness.BOUNDED: bounded_bound(before, coarsest)}
    bound = bounds.get(step.soundness, math.inf)
    worst = 0.0
    for i, (a, b) in enumerate(zip(reference, found, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(f"output {i} is {type_text(b)}, it was {type_text(a)}")
        if not a.is_floating_point():
            if step.soundness is Soundness.EXACT and not torch.equal(a, b):
                raise VerificationError(f"output {i} differs, though the pass is exact")
            continue
        finite = torch.isfinite(a)
        if not bool(torch.isfinite(b[finite]).all()):
            raise VerificationError(f"output {i} is no longer finite")
        error = fidelity(a[finite], b[finite])["relative_error"]
        worst = max(worst, error)
        if error > bound:
            advice = "; is the model stable in this dtype?" if step.soundness is Soundness.BOUNDED else ""
            raise VerificationError(
                f"output {i} differs by {error:.3g} (relative), a pass that is {step.soundness.value} may cause "
                f"{bound:.3g}{advice}"
            )
    if step.soundness is Soundness.LOSSY:
        _within_prediction(context, coarsest)
        if step.name == "apply_modules":
            check_blocks(before, after, probe, context.notes["blocks"], exact_bound(coarsest))
        check_operators(before, after, {row.name: row.weight_error for row in context.notes.get("apply_forms", [])})
    return {"output_error": worst, **({"bound": bound} if math.isfinite(bound) else {})}


def _within_prediction(context: Context, dtype: torch.dtype) -> None:
    """The measured error of each site must be what the fit predicted, up to sampling and rounding."""
    for row in [*context.notes.get("apply_modules", []), *context.notes.get("apply_forms", [])]:
        if row.measured_error is None:
            continue
        # The sample is a part of the data the prediction was made on: twice the figure is beyond chance.
        bound = 2 * row.predicted_error + exact_bound(dtype)
        if row.measured_error > bound:
            raise VerificationError(
                f"site '{row.name}' ({row.form}) has a measured error of {row.measured_error:.3g}, "
                f"{row.predicted_error:.3g} was predicted"
            )


def check_operators(before: Program, after: Program, errors: dict[str, float]) -> None:
    """Each operator must stand for its site's own weight, within the error its fit had, and compute what it stands for.

    Parameters
    ----------
    before, after
        Around `apply_forms`; raised linears and operators carry the mark ``recast_site``.
    errors
        Relative weight error of each fit, by name of the site or of its parts.
    """
    constants = Constants(before)
    weights = {
        n.meta["recast_site"]: n.args[1]
        for n in before.graph.nodes
        if "recast_site" in n.meta and n.op == "call_function"
    }
    for node in after.graph.find_nodes(op="call_module"):
        module = after.module.get_submodule(str(node.target))
        weight = weights.get(node.meta.get("recast_site"))
        if not isinstance(module, OperatorModule) or not isinstance(weight, fx.Node):
            continue
        if weight not in constants or any(s.nbytes() == 0 for s in constants.storages(weight)):
            continue  # a released weight was checked when it was fitted
        wanted, operator = constants.value(weight).detach().double(), module.operator
        dense = operator.to_dense().detach()
        dense = dense if module.order is None else dense[module.order]
        if dense.shape != wanted.shape:
            raise VerificationError(
                f"site '{module.site}' has an operator of shape {tuple(dense.shape)}, its weight {tuple(wanted.shape)}"
            )
        mine = [e for name, e in errors.items() if name == module.site or name.rpartition(".")[0] == module.site]
        found = fidelity(wanted, dense)["relative_error"]
        slack = exact_bound(operator.dtype)
        if found > max(mine, default=0.0) * 1.001 + slack:
            raise VerificationError(
                f"site '{module.site}' ({module.form}) stands for a matrix that differs by {found:.3g} from the "
                f"weight, its fit differed by {max(mine, default=0.0):.3g}"
            )
        x = torch.randn(8, dense.shape[1], generator=torch.Generator().manual_seed(0)).to(dense)
        with torch.no_grad():
            if gates(operator) or rounds_to_floats(operator):
                # The matrix is that of the operator without gates and rounding, which the error of the site tells about.
                y = unrounded(ungated(operator)).apply(x)
                y = y if module.order is None else y[..., module.order]
            else:
                # Numbers made up here may be anywhere; a grid known beforehand is for those of the calibration.
                free = without_grids(operator)
                y = module(x) if free is operator else free.apply(x)
                y = y if free is operator or module.order is None else y[..., module.order]
            error = fidelity(x @ dense.T, y)["relative_error"]
        if error > slack + (0.05 if _rounds(operator) else 0.0):
            raise VerificationError(
                f"site '{module.site}' ({module.form}) computes something else than its matrix: {error:.3g} (relative)"
            )


def _rounds(operator: Operator) -> bool:
    """Whether anything in an operator rounds activations."""
    return rounding_of(operator) is not None or any(_rounds(child) for child in operator.children().values())


def inputs_of(program: Program, context: Context) -> list[Any]:
    """The first calibration batch, or random inputs where there is none."""
    if context.calibration is not None and context.calibration.probe:
        return context.calibration.probe
    return probe_inputs(program)


def probe_inputs(program: Program, seed: int = 0) -> list[Any]:
    """Random inputs of the captured example's shapes; integers are small, so that they are valid in any vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for position, node in enumerate(program.inputs()):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            made.append(value.node.hint)
            continue
        if not isinstance(value, Tensor):
            made.append(program.interface.constants.get(position))
            continue
        shape = [size_hint(s) for s in value.shape]
        if value.is_floating_point():
            made.append(torch.randn(shape, generator=generator).to(value.dtype))
        elif value.dtype == torch.bool:
            made.append(torch.ones(shape, dtype=torch.bool))
        else:
            made.append(torch.randint(1, 2, shape, generator=generator).to(value.dtype))
    return made


def _fresh(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
