"""Products, convolutions and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.patterns.capture.onnx.operator import Call, operator
from recast.patterns.capture.onnx.values import Known, Left, largest

_CONTRIB = "com.microsoft"
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("MatMul")
def matmul(call: Call) -> Tensor:
    """As numpy's matmul."""
    return torch.matmul(call.tensor(0), call.tensor(1))


@operator("Gemm")
def gemm(call: Call) -> Tensor:
    """``alpha A @ B + beta C``, either side transposed."""
    a, b, c = call.tensor(0), call.tensor(1), call.maybe(2)
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    a = a.transpose(0, 1) if call.attribute("transA", 0) else a
    transposed = bool(call.attribute("transB", 0))
    if alpha == 1.0 and (c is None or (beta == 1.0 and c.ndim == 1 and c.shape[0] == b.shape[0 if transposed else 1])):
        return F.linear(a, b if transposed else b.transpose(0, 1), c)
    y = torch.matmul(a, b.transpose(0, 1) if transposed else b)
    y = y if alpha == 1.0 else y * alpha
    return y if c is None or beta == 0.0 else y + (c if beta == 1.0 else c * beta)


@operator("FusedMatMul", domain=_CONTRIB)
def fused_matmul(call: Call) -> Tensor:
    """``alpha A @ B`` with the last two dimensions of either exchanged."""
    call.refuse(transBatchA=0, transBatchB=0)
    a, b = call.tensor(0), call.tensor(1)
    a = a.transpose(-1, -2) if call.attribute("transA", 0) else a
    b = b.transpose(-1, -2) if call.attribute("transB", 0) else b
    y, alpha = torch.matmul(a, b), call.attribute("alpha", 1.0)
    return y if alpha == 1.0 else y * alpha


@operator("Einsum")
def einsum(call: Call) -> Tensor:
    """As numpy's einsum."""
    return torch.einsum(call.attribute("equation"), *[call.tensor(i) for i in range(len(call.inputs))])


def _sides(
    call: Call, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[Any], list[Any]]:
    """Padding before and after each dimension of space."""
    rank, mode = len(kernel), call.attribute("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = call.attribute("pads", [0] * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    before, after = [], []
    for i in range(rank):
        length = x.shape[i + 2]
        total = largest(
            0, ((length + strides[i] - 1) // strides[i] - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 - length
        )
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before, after


def _padded(x: Tensor, before: list[Any], after: list[Any], value: float = 0.0) -> Tensor:
    pairs = zip(reversed(before), reversed(after), strict=True)
    return F.pad(x, [side for pair in pairs for side in pair], value=value)


@operator("Conv")
def convolution(call: Call) -> Tensor:
    """Over one, two or three dimensions."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.maybe(2)
    rank = weight.ndim - 2
    if rank not in _CONVOLUTIONS:
        raise Left(f"over {rank} dimensions")
    strides, dilations = call.attribute("strides", [1] * rank), call.attribute("dilations", [1] * rank)
    before, after = _sides(call, x, [int(n) for n in weight.shape[2:]], strides, dilations)
    padding: Any = before
    if before != after:
        x, padding = _padded(x, before, after), [0] * rank
    return _CONVOLUTIONS[rank](x, weight, bias, strides, padding, dilations, call.attribute("group", 1))


@operator("ConvTranspose")
def transposed_convolution(call: Call) -> Tensor:
    """The gradient of a convolution."""
    call.refuse(auto_pad="NOTSET", output_shape=None)
    x, weight, bias = call.tensor(0), call.tensor(1), call.maybe(2)
    rank = weight.ndim - 2
    pads = call.attribute("pads", [0] * (2 * rank))
    if rank not in _TRANSPOSED or pads[:rank] != pads[rank:]:
        raise Left(f"over {rank} dimensions with pads={pads}")
    ones = [1] * rank
    return _TRANSPOSED[rank](
        x,
        weight,
        bias,
        call.attribute("strides", ones),
        pads[:rank],
        call.attribute("output_padding", [0] * rank),
        call.attribute("group", 1),
        call.attribute("dilations", ones),
    )


@operator("MaxPool")
def max_pool(call: Call) -> Tensor:
    """The largest of each window."""
    call.alone()
    call.refuse(storage_order=0)
    kernel = call.attribute("kernel_shape")
    x, rank = call.tensor(0), len(kernel)
    strides, dilations = call.attribute("strides", [1] * rank), call.attribute("dilations", [1] * rank)
    before, after = _sides(call, x, kernel, strides, dilations)
    ceil = bool(call.attribute("ceil_mode", 0))
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        if ceil:
            raise Left("with uneven padding and ceil_mode")
        x, before = _padded(x, before, after, -torch.inf), [0] * rank
    run = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    return run(x, kernel, strides, before, dilations, ceil)


@operator("AveragePool")
def average_pool(call: Call) -> Tensor:
    """The mean of each window."""
    kernel = call.attribute("kernel_shape")
    x, rank = call.tensor(0), len(kernel)
    strides, ones = call.attribute("strides", [1] * rank), [1] * rank
    call.refuse(dilations=ones)
    before, after = _sides(call, x, kernel, strides, ones)
    counted, ceil = bool(call.attribute("count_include_pad", 0)), bool(call.attribute("ceil_mode", 0))
    if before != after or (ceil and counted):
        raise Left("with uneven padding or ceil_mode")
    run: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    result: Tensor = run(x, kernel, strides, before, ceil, counted)
    return result


@operator("GlobalAveragePool")
def global_average_pool(call: Call) -> Tensor:
    """The mean over space."""
    x = call.tensor(0)
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call) -> Tensor:
    """The largest over space."""
    x = call.tensor(0)
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@operator("Resize")
def resize(call: Call) -> Tensor:
    """Images at other sizes, as torch's exporters write it."""
    call.refuse(antialias=0, exclude_outside=0, axes=None, keep_aspect_ratio_policy="stretch")
    x = call.tensor(0)
    mode, where = call.attribute("mode", "nearest"), call.attribute("coordinate_transformation_mode", "half_pixel")
    rank = x.ndim - 2
    options: dict[str, Any] = {}
    if mode == "nearest":
        if where != "asymmetric" or call.attribute("nearest_mode", "round_prefer_floor") != "floor":
            raise Left(f"by the nearest value with {where}")
    elif (
        where not in ("half_pixel", "pytorch_half_pixel", "align_corners")
        or rank > 2
        or (mode == "cubic" and rank != 2)
    ):
        raise Left(f"by mode={mode} with {where} over {rank} dimensions")
    else:
        mode = {("linear", 1): "linear", ("linear", 2): "bilinear", ("cubic", 2): "bicubic"}[mode, rank]
        options["align_corners"] = where == "align_corners"
    sizes, scales = call.optional(3), call.optional(2)
    if isinstance(sizes, Known) and sizes.values.size:
        return F.interpolate(x, size=sizes.list()[2:], mode=mode, **options)
    if not isinstance(scales, Known) or scales.list()[:2] != [1.0, 1.0]:
        raise Left("by scales that are computed, or of channels")
    return F.interpolate(x, scale_factor=scales.list()[2:], mode=mode, **options)
