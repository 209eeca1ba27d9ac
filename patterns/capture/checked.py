"""Whether a captured program gives what the model gives.

Tracing follows one path through the code with what it believes of values: patches that make a model traceable have been seen to
leave parts out, and `torch.export` to take a branch that the model does not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from recast.patterns.errors import CaptureError
from recast.patterns.program import Program

__all__ = ["check_result", "copied"]

_ANOTHER = (
    0.1  # relative error from which on it is another function, not another rounding or a choice that fell the other way
)


def check_result(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Run both on the example, from one state of the random numbers.

    Parameters
    ----------
    model, program
        The model as it is, and what was captured of it.
    args, kwargs
        The example.

    Returns
    -------
    list of str
        Notes, if results differ by more than rounding: half of the digits of the coarsest dtype.

    Raises
    ------
    CaptureError
        The program gives something else.
    """
    held = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    if any(isinstance(t, Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in held):
        return []  # no values to run on
    results = []
    for run in (model, program):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                own_args, own_kwargs = pytree.tree_map(copied, (args, kwargs))  # caches are written to
                result = run(*own_args, **own_kwargs)
                results.append([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)])
            except Exception as error:  # a model that runs in other ways only: there is nothing to compare with
                if run is model:
                    return []
                raise CaptureError(
                    f"capture: what was traced of {type(model).__name__} does not run: {str(error).splitlines()[0]}"
                ) from error
    wanted, found = results
    if len(wanted) != len(found):
        return []
    worst = max((_error(a, b) for a, b in zip(wanted, found, strict=True) if a.is_floating_point()), default=0.0)
    eps = max((torch.finfo(t.dtype).eps for t in wanted if t.is_floating_point()), default=0.0)
    if worst > _ANOTHER:
        raise CaptureError(
            f"capture: {type(model).__name__} computes something else when it is traced: results differ by {worst:.0%} on the "
            "example, whichever way it is traced; pass the inputs that it otherwise makes up (masks, positions) or "
            "attn_implementation='eager', capture a part of it, or check=False to take what torch.export gives"
        )
    return (
        [f"captured with results that differ by {worst:.1%} from the model's on the example"]
        if worst > eps**0.5
        else []
    )


def copied(leaf: Any) -> Any:
    """A tensor's copy, so that nothing writes to the caller's; anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _error(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.double(), found.double()
    kept = torch.isfinite(a)
    if not bool((torch.isfinite(b) == kept).all()):
        return float("inf")
    return float((a - b)[kept].norm() / a[kept].norm().clamp(min=1e-30)) if bool(kept.any()) else 0.0
