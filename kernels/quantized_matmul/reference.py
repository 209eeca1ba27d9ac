"""The meaning of integer weights, in plain torch: packing, rounding, and products with them.

A weight (m, n) is kept as integer codes with one scale, and perhaps one zero point, for each group of `group`
consecutive inputs of a row; the last group may be shorter. ``weight = (code - zero) * scale``. Eight-bit codes are
int8. Codes of two, three and four bits count from 0 and are packed in uint8 bytes; without zero points, the middle of
the range (8 of 0..15) stands for zero. Four-bit codes are two to a byte, the even input in the low half.

Every function traces: sizes of the weight are fixed, the number of tokens may be symbolic. All of it runs in float64
too.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = [
    "code_range",
    "dequantize",
    "dequantizing_matmul",
    "dynamic_int8_matmul",
    "group_count",
    "integer_matmul",
    "pack_codes",
    "pack_int4",
    "packed_bytes",
    "quantize",
    "quantize_inputs",
    "quantize_tokens",
    "rounded",
    "spread",
    "unpack_codes",
    "unpack_int4",
]

# The products of two int8 codes of -127..127 are at most 127² in size, -128 makes it 128²; float32 holds integers up to
# 2²⁴ exactly, so sums of this many products are exact in any order of addition.
EXACT_TERMS = 2**24 // 128**2


def group_count(features: int, group: int | None) -> int:
    """Return how many groups `features` inputs make; None is one group for all of them."""
    return 1 if group is None else -(-features // group)


def code_range(bits: int, symmetric: bool, reduce_range: bool = False) -> tuple[int, int]:
    """Return the smallest and largest code before the offset of packing; symmetric int8 leaves -128 out.

    With `reduce_range`, int8 codes stay within -64..64: products with bytes, added in pairs, then fit 16 bits, as x86 without
    VNNI adds them.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"quantize: {bits} bits are not supported; 2, 3, 4 or 8 would work")
    if bits < 8:
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    if reduce_range:
        return (-64, 64)
    return (-127, 127) if symmetric else (-128, 127)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes 0..15 (m, n) into bytes (m, ⌈n/2⌉), the even column in the low half.

    Examples
    --------
    >>> pack_int4(torch.tensor([[1, 2, 3]])).tolist()
    [[33, 3]]
    """
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor, features: int) -> Tensor:
    """Undo `pack_int4`: bytes (m, ⌈features/2⌉) to codes 0..15, uint8 (m, features)."""
    pairs = torch.stack((packed & 15, packed >> 4), -1)
    return pairs.reshape(packed.shape[0], -1)[:, :features]


def _planes(bits: int) -> list[int]:
    """Widths of the planes that codes are cut into, low bits first: powers of two, which do not cross bytes."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; 1 to 8 would work")
    return [width for width in (8, 4, 2, 1) if bits & width]


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `pack_codes` takes for a row of `count` codes."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes 0..2^bits-1 (m, n) into bytes (m, `packed_bytes`), whatever the number of bits.

    The bits of a code are cut into planes of 4, 2 and 1 bits, as `bits` needs them, low bits first: three-bit codes
    are a plane of two-bit numbers followed by a plane of single bits. Within a plane the first input is lowest.

    Examples
    --------
    >>> pack_codes(torch.tensor([[1, 2, 3, 7]]), 3).tolist()
    [[249, 8]]
    """
    codes = codes.to(torch.uint8)
    if bits == 4 and codes.shape[1] % 2 == 0 and sys.byteorder == "little" and codes.is_contiguous():
        pairs = codes.view(torch.int16)  # odd codes in the high byte; what is above the low byte afterwards goes
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    parts, shift = [], 0
    for width in _planes(bits):
        each = 8 // width
        plane = (codes >> shift) & (2**width - 1)
        plane = torch.nn.functional.pad(plane, (0, -plane.shape[1] % each))
        packed = plane[:, 0::each]
        for i in range(1, each):
            packed = packed | (plane[:, i::each] << (i * width))
        parts.append(packed)
        shift += width
    return torch.cat(parts, 1)


def unpack_codes(packed: Tensor, bits: int, features: int) -> Tensor:
    """Undo `pack_codes`: codes (m, features), uint8, or int32 where several planes make a code."""
    codes, shift, start = None, 0, 0
    for width in _planes(bits):
        size = -(-features * width // 8)
        part = packed[:, start : start + size]
        # (% and not &, which torch 2.13 writes to ONNX with operands of two types.)
        numbers = [(part >> (i * width)) % 2**width if width < 8 else part for i in range(8 // width)]
        plane = torch.stack(numbers, -1).reshape(packed.shape[0], -1)[:, :features]
        # (Sums in int32 and not bits put together: ONNX Runtime has no such products of bytes.)
        codes = plane if codes is None else codes.to(torch.int32) + plane.to(torch.int32) * 2**shift
        shift, start = shift + width, start + size
    assert codes is not None  # there is at least one plane
    return codes


def quantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int | None,
    reduce_range: bool = False,
) -> Tensor:
    """Round a weight to the codes nearest to it, for given scales.

    Parameters
    ----------
    weight
        (m, n), floating.
    scale, zero
        (m, groups); `zero` is None for a symmetric code.
    bits, group
        2, 3, 4 or 8; inputs in a group, None for all of them.
    reduce_range
        Keep int8 codes within -64..64, see `code_range`.

    Returns
    -------
    int8 (m, n), or below eight bits what `pack_codes` gives.
    """
    codes = _codes(weight, scale, zero, bits, group, reduce_range)
    if bits == 8:
        return codes.to(torch.int8)
    return pack_codes(codes + 2 ** (bits - 1) if zero is None else codes, bits)


def _codes(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None, reduce_range: bool
) -> Tensor:
    (m, n), groups = weight.shape, scale.shape[1]
    low, high = code_range(bits, zero is None, reduce_range)
    # Where groups divide a row, a view in place of scales that are spread.
    if groups == 1 or group is None or groups * group == n:
        weight, offset = weight.reshape(m, groups, n // groups), None if zero is None else zero.unsqueeze(-1)
        each = scale.unsqueeze(-1)
    else:
        each, offset = spread(scale, n, group), None if zero is None else spread(zero, n, group)
    # A group of zeros has scale 0; its codes are 0 whatever they are divided by.
    codes = torch.round_(weight.to(scale.dtype) / torch.where(each == 0, 1, each))
    if offset is not None:
        codes += offset.to(codes.dtype)
    return codes.clamp_(low, high).reshape(m, n)


def rounded(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int | None,
    reduce_range: bool = False,
) -> Tensor:
    """What `dequantize` gives of what `quantize` gives, without packing codes in between.

    Examples
    --------
    >>> rounded(torch.tensor([[1.1, -2.3]]), torch.tensor([[0.5]]), None, bits=8, group=None)
    tensor([[ 1.0000, -2.5000]])
    """
    codes = _codes(weight, scale, zero, bits, group, reduce_range)
    if zero is not None:
        codes = codes - spread(zero, weight.shape[1], group).to(scale.dtype)
    return codes * spread(scale, weight.shape[1], group)


def dequantize(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int | None,
    features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the weight (m, features) that codes stand for, in `dtype` (default: the scale's).

    Examples
    --------
    >>> codes = torch.tensor([[2, -4]], dtype=torch.int8)
    >>> dequantize(codes, torch.tensor([[0.5]]), None, bits=8, group=None, features=2)
    tensor([[ 1., -2.]])
    """
    codes = unpack_codes(values, bits, features) if bits < 8 else values
    numbers = codes.to(scale.dtype)
    if zero is not None:
        numbers = numbers - spread(zero, features, group).to(scale.dtype)
    elif bits < 8:
        numbers = numbers - 2 ** (bits - 1)
    weight = numbers * spread(scale, features, group)
    return weight if dtype is None else weight.to(dtype)


def dequantizing_matmul(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int | None,
) -> Tensor:
    """Multiply vectors (..., n) by a quantized weight, (..., m): dequantize to x's dtype, then a dense product."""
    weight = dequantize(values, scale, zero, bits=bits, group=group, features=x.shape[-1], dtype=x.dtype)
    return torch.nn.functional.linear(x, weight)


def quantize_tokens(x: Tensor, *, per_token: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Round vectors of (..., n) to int8 codes: ``x = (code - zero) * scale`` over the range of the vector, zero included.

    Parameters
    ----------
    x
        (..., n), floating.
    per_token
        A scale and a zero for each vector; else one pair for all of them, as ONNX's DynamicQuantizeLinear.

    Returns
    -------
    codes
        int8 (..., n).
    scale, zero
        (..., 1), or all sizes 1 if not `per_token`, in float32 (float64 for float64); `zero` holds whole numbers. Zeros
        become the code `zero` exactly.

    Examples
    --------
    >>> codes, scale, zero = quantize_tokens(torch.tensor([[0.0, 1.0, 2.55]]))
    >>> codes.tolist(), zero.tolist()
    ([[-128, -28, 127]], [[-128.0]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    top, bottom = wide.amax(-1, keepdim=True).clamp_min(0), wide.amin(-1, keepdim=True).clamp_max(0)
    if not per_token:
        # A zero is put to the vectors' own ranges, so that there is something to reduce even without vectors
        # (`pad` would do it too, and fix a symbolic number of vectors).
        one = [1] * wide.dim()
        top = torch.cat((top.reshape(-1), top.new_zeros(1))).amax().reshape(one)
        bottom = torch.cat((bottom.reshape(-1), bottom.new_zeros(1))).amin().reshape(one)
    scale = (top - bottom) / 255
    safe = torch.where(scale == 0, 1, scale)
    zero = torch.round(-128 - bottom / safe).clamp(-128, 127)
    codes = (torch.round(wide / safe) + zero).clamp(-128, 127)
    return codes.to(torch.int8), scale, zero


def quantize_inputs(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Round vectors to int8 codes on a grid that is known beforehand: ``x = (code - zero) * scale``; what is beyond it is cut off.

    Parameters
    ----------
    x
        (..., n), floating.
    scale, zero
        (1,), floating and int8; the scale is positive.

    Returns
    -------
    int8 (..., n).

    Examples
    --------
    >>> quantize_inputs(
    ...     torch.tensor([0.0, 1.0, 99.0]), torch.tensor([0.5]), torch.tensor([-8], dtype=torch.int8)
    ... ).tolist()
    [-8, -6, 127]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.round(wide / scale) + zero.to(wide.dtype)).clamp(-128, 127).to(torch.int8)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply int8 (..., t, k) by int8 (..., m, k) transposed, exactly: int32 (..., t, m).

    The products are taken in float32 over stretches short enough to be exact, on any device and for any size.
    """
    total = None
    for start in range(0, a.shape[-1], EXACT_TERMS):
        stretch = slice(start, start + EXACT_TERMS)
        part = a[..., stretch].float() @ b[..., stretch].float().transpose(-1, -2)
        total = part.to(torch.int32) if total is None else total + part.to(torch.int32)
    if total is None:
        raise ValueError("integer_matmul: there are no terms to add; at least one feature is needed")
    return total


def dynamic_int8_matmul(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    group: int | None = None,
    per_token: bool = True,
    inputs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multiply vectors by an int8 weight after rounding the vectors to int8 too.

    Parameters
    ----------
    x
        (..., n), floating.
    values
        (m, n) int8 codes of the weight.
    scale, zero
        (m, groups).
    group
        Inputs in a group, None for all of them.
    per_token
        See `quantize_tokens`.
    inputs
        Scale and zero point of the vectors, see `quantize_inputs`, in place of those of the range that they are found to have.

    Returns
    -------
    (..., m) in x's dtype: integer sums of each group are exact, then scaled by both scales and added in the scale's
    dtype.
    """
    m, n = values.shape
    if inputs is None:
        codes, token_scale, token_zero = quantize_tokens(x, per_token=per_token)
    else:
        codes, (token_scale, token_zero) = quantize_inputs(x, *inputs), inputs
    codes = codes.reshape(-1, n)
    vectors = x.reshape(-1, n)  # gives the number of tokens even where it is symbolic
    token_scale, token_zero = (
        t.expand(*x.shape[:-1], 1).reshape(vectors.shape[0], 1) for t in (token_scale, token_zero.to(torch.int32))
    )
    groups = group_count(n, group)
    if group is None or groups == 1:
        a, b, offset = codes, values, zero
    else:
        a, b = _groups_first(codes, group, groups), _groups_first(values, group, groups)
        offset = None if zero is None else zero.T.unsqueeze(-1)
    # sum (a - za)(w - zw) = sum a (w - zw) - za (sum w - n zw); groups padded with code 0 count only what they hold.
    sums = _offset(integer_matmul(a, b), a, offset)
    held = b.sum(-1, dtype=torch.int32)
    if offset is not None:
        sizes = torch.full((groups,), n if group is None or groups == 1 else group, dtype=torch.int32, device=x.device)
        if group is not None and groups > 1:
            sizes = torch.minimum(sizes, n - group * torch.arange(groups, dtype=torch.int32, device=x.device))
        size = sizes.reshape(-1, 1) if groups > 1 else sizes
        held = held - size * offset.squeeze(-1).to(torch.int32)
    sums = sums - token_zero * held.unsqueeze(-2)
    if groups == 1:
        total = sums.to(scale.dtype) * scale[:, 0]
    else:
        total = (sums.to(scale.dtype) * scale.T.unsqueeze(1)).sum(0)
    return (total * token_scale).to(x.dtype).reshape(*x.shape[:-1], m)


def _offset(sums: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    """Turn Σ a·code into Σ a·(code - zero), with zero (m, 1) or (groups, m, 1)."""
    if zero is None:
        return sums
    totals = codes.sum(-1, keepdim=True, dtype=torch.int32)
    return sums - totals * zero.to(torch.int32).transpose(-1, -2)


def _groups_first(codes: Tensor, group: int, groups: int) -> Tensor:
    extra = groups * group - codes.shape[1]
    # (`pad` would fix a symbolic number of rows.)
    padded = torch.cat((codes, codes.new_zeros(codes.shape[0], extra)), 1) if extra else codes
    return padded.reshape(-1, groups, group).transpose(0, 1)


def spread(per_group: Tensor, features: int, group: int | None) -> Tensor:
    """Repeat what each group holds, (m, groups), so that it broadcasts against (m, features)."""
    if per_group.shape[1] == 1 or group is None:
        return per_group
    # Gathered rather than expanded and cut: Inductor (torch 2.13, CPU) compiles `expand(...).reshape(...)[:, :n]` to code
    # that reads past the end where the last group is shorter.
    return per_group.index_select(1, torch.arange(features, device=per_group.device) // group)
