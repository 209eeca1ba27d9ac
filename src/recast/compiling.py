"""`recast.compile`: `torch.compile` with the ``recast`` backend, and with what a backend cannot do, as it comes after tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recast.backend import Options
from recast.patterns.capture import switches
from recast.patterns.errors import RecastError

__all__ = ["compile"]


def compile(  # noqa: A001  # it is torch.compile's counterpart
    model: nn.Module, recipe: Any = "int8", *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any
) -> nn.Module:
    """Compile a model's calls in place with the ``recast`` backend, as ``model.compile(backend="recast")`` does.

    A mixture of experts of transformers whose experts run in a Python loop over those that were hit breaks `torch.compile`'s
    graph at every layer, and what is between the breaks is all that a backend sees. Here the experts are switched, for the
    time of each call, to code that can be traced, and back to what the model had.

    Parameters
    ----------
    model
        Any module; in eval mode for lossy recipes.
    recipe
        As for `recast.plan`: a form's text, a path to a YAML file, a dict, or a `Recipe`.
    fullgraph, dynamic
        As `torch.compile` takes them.
    options
        Of the backend: see `recast.backend.Options`.

    Returns
    -------
    torch.nn.Module
        The same model; `generate` and other methods that call it use the compiled code.

    Raises
    ------
    RecastError
        The first argument is no module.
    RecipeError
        There is no option of this name.

    Examples
    --------
    >>> import torch, recast
    >>> model = recast.compile(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), "int8")
    >>> model(torch.ones(2, 64)).shape  # doctest: +SKIP
    torch.Size([2, 64])
    """
    if not isinstance(model, nn.Module):
        raise RecastError(
            f"compile: a torch.nn.Module is needed, {type(model).__name__} was given; for a function use "
            'torch.compile(function, backend="recast")'
        )
    given = {**options, "recipe": recipe}
    Options.of(given)  # a wrong name is told now, not at the first call
    compiled = torch.compile(model._call_impl, fullgraph=fullgraph, dynamic=dynamic, backend="recast", options=given)
    configs = switches.experts_configs(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        with switches.experts(model, configs=configs):
            return compiled(*args, **kwargs)

    model._compiled_call_impl = call
    return model
