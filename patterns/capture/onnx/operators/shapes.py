"""Shapes and layouts: what costs nothing, and sizes, which stay numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recast.patterns.capture.onnx.operator import Call, operator
from recast.patterns.capture.onnx.values import Known, Left, Value, numbers, tensor_of

_SMALL = 64


@operator("Shape")
def shape(call: Call) -> Known:
    """Sizes, or some of them."""
    return Known.of([*call[0].shape][slice(call.attribute("start", 0), call.attribute("end"))])


@operator("Size")
def size(call: Call) -> Known:
    """Number of elements."""
    count: Any = 1
    for length in call[0].shape:
        count = count * length
    return Known.of(count)


@operator("Reshape")
def reshape(call: Call) -> Value:
    """To sizes of which one may be open (-1) and some kept (0)."""
    value, wanted = call[0], call.known(1).list()
    if not call.attribute("allowzero", 0):
        wanted = [value.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wanted)]
    if isinstance(value, Known):
        if all(isinstance(n, int) for n in wanted):
            return Known(value.values.reshape(wanted), value.dtype)
        value = value.tensor()
    return value.reshape(wanted)


@operator("Flatten")
def flatten(call: Call) -> Value:
    """To two dimensions, parted at an axis."""
    x = call.tensor(0)
    axis = call.attribute("axis", 1)
    axis += x.ndim if axis < 0 else 0
    if axis == 0:
        return x.reshape(1, -1)
    x = x.flatten(axis) if axis < x.ndim else x.unsqueeze(-1)
    return x.flatten(0, axis - 1)


@operator("Squeeze")
def squeeze(call: Call) -> Value:
    """Without dimensions of one."""
    value, axes = call[0], call.axes()
    if isinstance(value, Known):
        return Known(np.squeeze(value.values, None if axes is None else tuple(axes)), value.dtype)
    if axes is None:
        return value.squeeze()
    for axis in sorted((a % value.ndim for a in axes), reverse=True):
        value = value.squeeze(axis)
    return value


@operator("Unsqueeze")
def unsqueeze(call: Call) -> Value:
    """With dimensions of one, at places in the result."""
    value, axes = call[0], call.axes()
    if axes is None:
        raise Left("without axes")
    rank = len(value.shape) + len(axes)
    places = sorted(axis % rank for axis in axes)
    if isinstance(value, Known):
        return Known(np.expand_dims(value.values, tuple(places)), value.dtype)
    for axis in places:
        value = value.unsqueeze(axis)
    return value


@operator("Transpose")
def transpose(call: Call) -> Value:
    """Dimensions in another order, the reverse one by default."""
    value = call[0]
    order = call.attribute("perm") or [*range(len(value.shape))][::-1]
    if isinstance(value, Known):
        return Known(value.values.transpose(order), value.dtype)
    moved = [i for i, axis in enumerate(order) if i != axis]
    if not moved:
        return value
    return value.transpose(*moved) if len(moved) == 2 else value.permute(order)


@operator("Expand")
def expand(call: Call) -> Value:
    """Broadcast, in both directions."""
    value, wanted = tensor_of(call[0]), call.known(1).list()
    own: list[Any] = [1] * (len(wanted) - value.ndim) + [*value.shape]
    wanted = [1] * (len(own) - len(wanted)) + wanted
    return value.expand([o if isinstance(w, int) and w == 1 else w for o, w in zip(own, wanted, strict=True)])


@operator("Tile")
def tile(call: Call) -> Value:
    """Repeated along each dimension."""
    value, times = call[0], call.known(1).list()
    if isinstance(value, Known):
        return Known(np.tile(value.values, numbers(times)), value.dtype)
    return value.repeat(times)


@operator("Concat")
def concat(call: Call) -> Value:
    """Joined along an axis."""
    values = [value for value in call.inputs if value is not None]
    axis = call.attribute("axis")
    held = [value for value in values if isinstance(value, Known)]
    if len(held) == len(values):
        return Known(np.concatenate([value.values for value in held], axis), held[0].dtype)
    tensors = [tensor_of(value) for value in values]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


@operator("Split")
def split(call: Call) -> list[Value]:
    """Cut along an axis, evenly or to sizes."""
    value, axis = call[0], call.attribute("axis", 0)
    sizes = call.attribute("split")
    if sizes is None and call.optional(1) is not None:
        sizes = call.known(1).list()
    count = call.attribute("num_outputs") or len(call.node.outputs)
    if isinstance(value, Known):
        cuts = count if sizes is None else list(np.cumsum(numbers(sizes))[:-1])
        return [Known(part, value.dtype) for part in np.array_split(value.values, cuts, axis)]
    if sizes is None:
        sizes = (value.shape[axis] + count - 1) // count
    return list(torch.split(value, sizes, axis))


@operator("Slice")
def slice_(call: Call) -> Value:
    """A range along some dimensions."""
    value = call[0]
    starts, ends = call.known(1).list(), call.known(2).list()
    axes = numbers(call.known(3).list()) if call.optional(3) is not None else list(range(len(starts)))
    steps = numbers(call.known(4).list()) if call.optional(4) is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(value.shape)
        if step < 0:
            value = _backwards(value, axis, start, end, step)
            continue
        value = _taken(value, axis, slice(start, end, step))
    return value


def _taken(value: Value, axis: int, what: Any) -> Value:
    """What Python's own indexing takes of an axis; bounds beyond the end are cut as ONNX cuts them."""
    place: Any = (slice(None),) * axis + (what,)
    if isinstance(value, Known):
        return Known(value.values[place], value.dtype)
    result: Tensor = value[place]
    return result


def _backwards(value: Value, axis: int, start: Any, end: Any, step: int) -> Value:
    if isinstance(value, Known):
        stop = None if isinstance(end, int) and end < -len(value.values) else end
        return _taken(value, axis, slice(start, stop, step))
    whole = step == -1 and start == -1 and isinstance(end, int) and end < -(2**31)
    length = value.shape[axis]
    if whole or (step == -1 and isinstance(length, int) and start in (-1, length - 1) and end < -length):
        return value.flip(axis)
    if not isinstance(length, int):
        raise Left("a slice that runs backwards over a free size")
    rows = range(length)[slice(start, None if end < -length else end, step)]
    return value.index_select(axis, torch.tensor(list(rows), dtype=torch.int64))


@operator("Gather")
def gather(call: Call) -> Value:
    """Rows, or what lies at other indices of an axis: a lookup if the table is a matrix."""
    value, index, axis = call[0], call[1], call.attribute("axis", 0)
    if isinstance(value, Known):
        if not isinstance(index, Known):
            return value.tensor()[index]
        taken = np.take(value.values, np.array(index.values, dtype=np.int64), axis)
        return Known(taken, value.dtype) if isinstance(taken, np.ndarray) else Known.of(taken, value.dtype)
    axis %= value.ndim
    if isinstance(index, Known):
        if index.values.ndim == 0:
            return value.select(axis, index.number)
        places = numbers(index.list())
        first = places[0] if places else 0
        if index.values.ndim == 1 and places and places == list(range(first, first + len(places))) and first >= 0:
            return value.narrow(axis, first, len(places))
        index = index.tensor()
    if axis == 0 and value.ndim == 2 and value.is_floating_point():
        return F.embedding(index, value)
    return _taken(value, axis, index)


@operator("GatherElements")
def gather_elements(call: Call) -> Value:
    """A value for each index."""
    x, index = call.tensor(0), call.tensor(1)
    axis = call.attribute("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    return torch.gather(x, axis, index.to(torch.int64))


@operator("GatherND")
def gather_nd(call: Call) -> Value:
    """What lies at tuples of indices."""
    call.refuse(batch_dims=0)
    x, index = call.tensor(0), call.tensor(1)
    if not isinstance(index.shape[-1], int):
        raise Left("with tuples of a length that depends on a size")
    result: Tensor = x[index.unbind(-1)]
    return result


@operator("ScatterND")
def scatter_nd(call: Call) -> Value:
    """A copy with some places overwritten."""
    call.refuse(reduction="none")
    x, index, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    if not isinstance(index.shape[-1], int):
        raise Left("with tuples of a length that depends on a size")
    return torch.index_put(x, index.unbind(-1), updates)


@operator("ScatterElements")
def scatter_elements(call: Call) -> Value:
    """A copy with a value written at each index."""
    call.refuse(reduction="none")
    x, index, axis = call.tensor(0), call.tensor(1), call.attribute("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    return torch.scatter(x, axis, index.to(torch.int64), call.tensor(2))


@operator("Range")
def range_(call: Call) -> Value:
    """Numbers from, to, by."""
    start, limit, step = (call.known(i).number for i in range(3))
    dtype = call[0].dtype
    if all(isinstance(n, int) for n in (start, limit, step)) and len(range(start, limit, step)) <= _SMALL:
        return Known.of(list(range(start, limit, step)), dtype)
    return torch.arange(start, limit, step, dtype=dtype)


@operator("ConstantOfShape")
def constant_of_shape(call: Call) -> Value:
    """One number everywhere, a float 0 by default."""
    held = call.attribute("value")
    number, dtype = (0.0, torch.float32) if held is None else (held.number, held.dtype)
    sizes = call.known(0).list()
    few = len(sizes) <= 1 and all(isinstance(n, int) and n <= _SMALL for n in sizes)
    if few and (not dtype.is_floating_point or not sizes):
        return Known(np.full(sizes, number, dtype=object), dtype)
    return torch.full(sizes, number, dtype=dtype)


@operator("Trilu")
def triangle(call: Call) -> Value:
    """The upper or lower triangle."""
    offset = call.known(1).number if call.optional(1) is not None else 0
    x = call.tensor(0)
    return torch.triu(x, offset) if call.attribute("upper", 1) else torch.tril(x, offset)


@operator("EyeLike")
def eye_like(call: Call) -> Value:
    """The identity of the shape given."""
    call.refuse(k=0)
    call.only("k")
    rows, columns = call[0].shape
    return torch.eye(rows, columns, dtype=call[0].dtype)


@operator("OneHot")
def one_hot(call: Call) -> Value:
    """One of two values at each place of a new last dimension."""
    call.refuse(axis=-1)
    index, depth, values = call.tensor(0), call.known(1).number, call.tensor(2)
    hit = torch.remainder(index, depth).unsqueeze(-1) == torch.arange(depth)
    return torch.where(hit, values[1], values[0])


@operator("Pad")
def pad(call: Call) -> Value:
    """Wider on both sides of some dimensions."""
    x = call.tensor(0)
    pads = call.known(1).list() if call.attribute("pads") is None else call.attribute("pads")
    axes = numbers(call.known(3).list()) if call.optional(3) is not None else list(range(x.ndim))
    value = call.known(2).number if call.optional(2) is not None else call.attribute("value", 0.0)
    sides: list[Any] = [0] * (2 * x.ndim)
    for i, axis in enumerate(axes):
        place = x.ndim - 1 - axis % x.ndim  # torch counts from the last
        sides[2 * place : 2 * place + 2] = pads[i], pads[i + len(axes)]
    while sides and sides[-2:] == [0, 0]:
        sides = sides[:-2]
    if not sides:
        return x
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        call.attribute("mode", "constant")
    ]
    if mode == "constant":
        return F.pad(x, sides, value=value)
    space = max(1, x.ndim - 2)  # torch takes all dimensions of space at once, and no others
    if len(sides) > 2 * space:
        raise Left(f"with mode={mode} beyond the dimensions of space")
    return F.pad(x, sides + [0] * (2 * space - len(sides)), mode=mode)


@operator("DepthToSpace")
def depth_to_space(call: Call) -> Value:
    """Channels spread over space."""
    x, block = call.tensor(0), call.attribute("blocksize")
    n, c, h, w = x.shape
    if call.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(call: Call) -> Value:
    """Blocks of space gathered into channels."""
    x, block = call.tensor(0), call.attribute("blocksize")
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)
