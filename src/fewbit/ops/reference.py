"""Integer matrix products in plain torch, exact: what every compiled kernel is compared with.

Products of codes are summed in float32 in pieces small enough that every partial sum is an integer below 2^24, which
float32 holds exactly, and the pieces are added in int32. This runs at the speed of the float GEMM, where torch's own
integer matmul on CPUs is either slow or saturates.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fewbit.qtensor import QTensor, dynamic_qparams, integers
from fewbit.spec import QuantSpec

EXACT = 2**24  # every integer up to this is a float32
LARGEST_SUM = 2**31 - 1  # of an int32 accumulator
GROUP_PIECE = 2**14  # output channels times groups whose products are held at once


def exactly(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which float32 products are float32: autocast would round the codes to 16 bits."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def largest_code(spec: QuantSpec) -> int:
    """The largest |code - zero_point| of a tensor of integer format."""
    low, high = spec.number.bound(spec.symmetric)
    return int(max(-low, high) if spec.symmetric else high - low)


def integer_values(codes: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """``codes - zero_point`` as float32, for codes ``[rows, K]`` and one zero point a row, or a group of a row."""
    values = codes.to(torch.float32)
    if zero_point is None:
        return values
    offset = zero_point.to(torch.float32)
    if offset.shape[-1] > 1:
        offset = offset.repeat_interleave(group_size, -1)[..., : codes.shape[-1]]
    return values - offset


def integer_input(x: Tensor, spec: QuantSpec, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """``codes - zero_point`` as float32, and the scale. Without a ``scale`` the grid is that of x's own range."""
    if scale is None:
        scale, zero_point = dynamic_qparams(x, spec)
    return integers(x, spec, scale, zero_point), scale


def integer_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """``a`` ``[..., M, K]`` times ``b`` ``[..., N, K]`` transposed, int32 ``[..., M, N]``.

    Both are float32 holding integers with ``|a_i * b_j| <= bound``; K * bound must be below 2^31.
    """
    piece = max(1, EXACT // bound)
    depth = a.shape[-1]
    if depth <= piece:
        return torch.matmul(a, b.transpose(-1, -2)).to(torch.int32)
    total = torch.matmul(a[..., :piece], b[..., :piece].transpose(-1, -2)).to(torch.int32)
    for begin in range(piece, depth, piece):
        part = torch.matmul(a[..., begin : begin + piece], b[..., begin : begin + piece].transpose(-1, -2))
        total = total + part.to(torch.int32)
    return total


def integer_linear(a: Tensor, a_scale: Tensor, weight: Tensor, weight_scale: Tensor, group: int, bound: int) -> Tensor:
    """float32 ``[M, N]`` from integers ``a`` ``[M, K]`` and ``weight`` ``[N, K]`` held in float32.

    Scales are ``[M or 1, 1 or G]`` and ``[N or 1, 1 or G]``, G = ceil(K / group); where both are ``[., 1]``, group is 0.
    The int32 sums of a group are exact; they are scaled and added in float32.
    """
    if group == 0:
        return integer_matmul(a, weight, bound).to(torch.float32) * a_scale * weight_scale.T
    missing = -a.shape[1] % group
    a, weight = torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(weight, (0, missing))
    groups = a.shape[1] // group
    a = a.reshape(a.shape[0], groups, group).transpose(0, 1)
    weight = weight.reshape(len(weight), groups, group).transpose(0, 1)
    # [G, M, 1] and [G, 1, N]
    a_scale = a_scale.expand(-1, groups).T.unsqueeze(2)
    weight_scale = weight_scale.expand(-1, groups).T.unsqueeze(1)
    total = torch.zeros((), device=a.device)
    step = max(1, GROUP_PIECE // max(1, weight.shape[1]))
    for begin in range(0, groups, step):
        part = slice(begin, begin + step)
        sums = integer_matmul(a[part], weight[part], bound).to(torch.float32)
        total = total + (sums * a_scale[part] * weight_scale[part]).sum(0)
    return total


def has_integer_product(weight: QTensor, spec: QuantSpec) -> bool:
    """Whether ``integer_linear`` takes these weights with inputs of this spec: integer formats, groups that agree, and
    sums of at least one product that fit int32."""
    if not (weight.spec.number.is_integer and spec.number.is_integer):
        return False
    sizes = {tensor.granularity.group_size for tensor in (weight.spec, spec) if tensor.granularity.kind == "group"}
    rowwise = weight.spec.granularity.kind != "channel" or weight.spec.granularity.axis == 0
    inner = spec.granularity.kind != "channel"
    terms = min([weight.shape[1], *sizes])
    fits = 0 < terms * largest_code(weight.spec) * largest_code(spec) <= LARGEST_SUM
    return len(sizes) <= 1 and rowwise and inner and fits
