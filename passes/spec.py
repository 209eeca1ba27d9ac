"""Structure of inputs and outputs as JSON, and back without running anything the file names."""

from __future__ import annotations

import collections
import importlib
import sys
from typing import Any

from torch.utils import _pytree as pytree

from recast.patterns.errors import ArtifactError

__all__ = ["decode_spec", "encode_spec"]

_PLAIN: dict[str, Any] = {"list": list, "tuple": tuple, "dict": dict, "OrderedDict": collections.OrderedDict}
# Packages whose output classes may be imported by name when an artifact is loaded; others must be imported already.
_TRUSTED = ("transformers", "diffusers")


def encode_spec(spec: Any) -> Any:
    """Describe a pytree structure with lists, dicts and strings.

    Examples
    --------
    >>> spec = pytree.tree_structure(((1, {"a": 2}), {}))
    >>> decode_spec(encode_spec(spec)) == spec
    True
    """
    if spec.is_leaf():
        return "*"
    kind = spec.type
    children = [encode_spec(child) for child in spec.children()]
    for name, plain in _PLAIN.items():
        if kind is plain:
            return {
                "kind": name,
                "keys": list(spec.context) if spec.context is not None else None,
                "children": children,
            }
    if kind is type(None):
        return {"kind": "none", "keys": None, "children": []}
    named = spec.context if isinstance(spec.context, type) else kind  # namedtuples carry their class as context
    return {
        "kind": "object",
        "class": f"{named.__module__}:{named.__qualname__}",
        "keys": _keys(spec.context, named),
        "absent": _absent(spec.context),
        "children": children,
    }


def _keys(context: Any, kind: type) -> list[str] | None:
    if hasattr(kind, "_fields"):
        return list(kind._fields)
    if isinstance(context, list | tuple) and context and isinstance(context[0], list):
        context = context[0]  # torch.export.register_dataclass: [names of values, names that are None]
    if isinstance(context, list | tuple) and all(isinstance(k, str) for k in context):
        return list(context)
    return None


def _absent(context: Any) -> list[str]:
    """Fields of a registered dataclass that were None, and so hold no value."""
    return (
        list(context[1])
        if isinstance(context, list | tuple) and len(context) == 2 and isinstance(context[1], list)
        else []
    )


def decode_spec(data: Any) -> Any:
    """Structure that `encode_spec` described; classes that cannot be had become dicts."""
    if data == "*":
        return pytree.tree_structure(0)
    if not isinstance(data, dict) or "kind" not in data:
        raise ArtifactError(f"artifact: the structure of inputs or outputs cannot be read: {data!r}")
    children = [decode_spec(child) for child in data["children"]]
    example = [pytree.tree_unflatten([0] * c.num_leaves, c) for c in children]
    return pytree.tree_structure(_rebuild(data, example))


def _rebuild(data: dict[str, Any], children: list[Any]) -> Any:
    kind, keys = data["kind"], data.get("keys")
    if kind == "none":
        return None
    if kind in ("dict", "OrderedDict"):
        return _PLAIN[kind](zip(keys or [], children, strict=True))
    if kind in _PLAIN:
        return _PLAIN[kind](children)
    cls = _class(str(data.get("class", "")))
    named = dict(zip(keys, children, strict=True)) if keys is not None and len(keys) == len(children) else None
    if cls is not None and named is not None:
        return cls(**named, **dict.fromkeys(data.get("absent", [])))
    return named if named is not None else tuple(children)


def _class(path: str) -> type | None:
    module, _, name = path.partition(":")
    if module not in sys.modules and module.split(".")[0] not in _TRUSTED:
        return None
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    # Only classes that pytree knows how to take apart, or namedtuples: nothing else is ever called.
    known = isinstance(found, type) and (found in pytree.SUPPORTED_NODES or hasattr(found, "_fields"))
    return found if known else None
