"""The quantization arithmetic: the only place where scales meet codes.

    codes = clamp(round(x / scale) + zero_point)        x ~ (codes - zero_point) * scale

Rounding is half to even. Zero is always exactly representable: every range is widened to contain it. A block whose
elements are all zero, and an empty one, has scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.formats import Format
from fewbit.spec import Granularity, QuantSpec

PIECE = 2**20  # elements of a matrix that are rounded at once
LARGEST = 0.99 * torch.finfo(torch.float32).max  # what a code times a rounded scale can reach without overflow


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor.

    ``packed``: codes, one an element of ``spec.number.dtype`` for 8 bits; for 4 bits int32 words of eight codes along the
    last axis (see ``pack``). ``scale``: one a block, of the shape that ``scale_shape`` gives; a QTensor if ``spec.scale``
    is set. ``zero_point``: the code of 0.0, same shape as the scale; None if ``spec.symmetric``.
    """

    packed: Tensor
    scale: Tensor | QTensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]

    @property
    def codes(self) -> Tensor:
        """The codes, of ``shape`` and ``spec.number.dtype``."""
        return unpack(self.packed, self.spec.number, self.shape)

    @property
    def scale_values(self) -> Tensor:
        """The scales as float32."""
        return scale_values(self.scale, self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, in memory and on disk."""
        scale = self.scale.nbytes
        return self.packed.nbytes + scale + (0 if self.zero_point is None else self.zero_point.nbytes)


def quantize(x: Tensor, spec: QuantSpec, check: bool = True) -> QTensor:
    """Round ``x`` to the grid that its own range gives.

    ``check``: ValueError if ``x`` has a NaN, an infinity, or a value beyond LARGEST.
    """
    return quantize_with(x, spec, *qparams(*value_range(x, spec, check), spec, check))


def quantize_with(x: Tensor, spec: QuantSpec, scale: Tensor | QTensor, zero_point: Tensor | None) -> QTensor:
    """Round ``x`` to the grid of these scales and zero points (as ``qparams`` returns them)."""
    values = scale_values(scale, spec)
    if x.ndim == 2 and len(values) == len(x) and x.numel() > PIECE:  # no scale spans two rows: spare memory
        rows = max(1, PIECE // x.shape[1])
        packed = torch.cat(
            [
                pack(encode(x[part], spec, values[part], None if zero_point is None else zero_point[part]), spec.number)
                for part in (slice(begin, begin + rows) for begin in range(0, len(x), rows))
            ]
        )
    else:
        packed = pack(encode(x, spec, values, zero_point), spec.number)
    return QTensor(packed, scale, zero_point, spec, tuple(x.shape))


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes stand for, of ``q.shape``."""
    return decode(q.codes, q.spec, q.scale_values, q.zero_point).to(dtype)


def fake_quantize(x: Tensor, spec: QuantSpec, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """``x`` rounded to its grid, in x's dtype. Without a scale the grid is that of x's own range (dynamic).

    Differentiable with respect to x as if it were the identity (straight-through).
    """
    if scale is None:
        scale, zero_point = dynamic_qparams(x.detach(), spec)
    rounded = decode(encode(x, spec, scale, zero_point), spec, scale, zero_point).to(x.dtype)
    return straight_through(rounded, x)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, to the bit, with the gradient of ``gradient`` where one is wanted."""
    return value.detach() + (gradient - gradient.detach()) if gradient.requires_grad else value


def dynamic_qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale values and zero point of x's own range, without looking at the data (a NaN in a block makes its scale NaN)."""
    scale, zero_point = qparams(*value_range(x, spec, check=False), spec, check=False)
    return scale_values(scale, spec), zero_point


def encode(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Codes of ``x``, of the same shape. A NaN gets the code of 0; a block of scale 0 too."""
    return _unblocked(spec.number.encode(_clamped(x, spec, scale, zero_point)), x.shape, spec.granularity)


def integers(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """``encode(x) - zero_point`` for an integer format, held in float32."""
    values = _clamped(x, spec, scale, zero_point)
    values = values.round_() if zero_point is None else values.sub_(_aligned(zero_point, spec.granularity))
    return _unblocked(values.to(torch.float32), x.shape, spec.granularity)


def _clamped(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values to encode, blocked: ``clamp(round(x / scale) + zero_point)``, not yet rounded without a zero point."""
    low, high = spec.number.bound(spec.symmetric)
    view = _blocks(_working(x.detach()), spec.granularity)
    step = _aligned(scale, spec.granularity).to(view.dtype)
    # From here on in place: the quotient is ours.
    values = (view / torch.where(step > 0, step, torch.inf)).nan_to_num_(0.0, torch.inf, -torch.inf)
    if zero_point is not None:
        values = values.round_().add_(_aligned(zero_point, spec.granularity))
    return values.clamp_(low, high)


def decode(codes: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """float32 values of ``codes``, of the same shape."""
    values = spec.number.decode(_blocks(codes, spec.granularity))
    if zero_point is not None:
        values = values - _aligned(zero_point, spec.granularity).to(values.dtype)
    values = values * _aligned(scale, spec.granularity).to(torch.float32)
    return _unblocked(values, codes.shape, spec.granularity)


def within(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Which elements lie between the ends of their grid, of x's shape."""
    low, high = spec.number.bound(spec.symmetric)
    view = _blocks(_working(x), spec.granularity)
    step = _aligned(scale, spec.granularity).to(torch.float32)
    offset = 0 if zero_point is None else _aligned(zero_point, spec.granularity).to(torch.float32)
    inside = (view >= (low - offset) * step) & (view <= (high - offset) * step)
    return _unblocked(inside, x.shape, spec.granularity)


def value_range(x: Tensor, spec: QuantSpec, check: bool = True) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, in the shape of the scale. ``check``: ValueError on NaN or infinity."""
    shape = scale_shape(x.shape, spec.granularity)
    if x.numel() == 0:
        zeros = torch.zeros(shape, dtype=torch.float32, device=x.device)
        return zeros, zeros
    view = _blocks(_working(x), spec.granularity)
    axes = _reduced_axes(view.ndim, spec.granularity)
    low = high = view
    if axes:  # torch takes no axes for all axes
        low, high = view.amin(axes, keepdim=True).reshape(shape), view.amax(axes, keepdim=True).reshape(shape)
    if check and not bool((low.isfinite() & high.isfinite()).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"found {bad} NaN or infinite of {x.numel()} values; all must be finite.")
    return low, high


def reduce_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """The sum over each block of ``x``, in the shape of the scale."""
    view = _blocks(x, granularity)
    axes = _reduced_axes(view.ndim, granularity)
    return view.sum(axes, keepdim=True).reshape(scale_shape(x.shape, granularity)) if axes else view


def qparams(low: Tensor, high: Tensor, spec: QuantSpec, check: bool = True) -> tuple[Tensor | QTensor, Tensor | None]:
    """Scale and zero point that cover [low, high] and 0.

    The scale is at least the smallest normal number of its dtype. ``check``: ValueError if the range goes beyond LARGEST.
    """
    # float64: high - low and the division must not overflow or round twice.
    low, high = low.to(torch.float64).clamp(max=0), high.to(torch.float64).clamp(min=0)
    if check and bool((torch.maximum(-low, high) > LARGEST).any()):
        raise ValueError(f"found a range of {float(low.min()):g} to {float(high.max()):g}; at most {LARGEST:.3g} fits.")
    code_low, code_high = spec.number.bound(spec.symmetric)
    if spec.symmetric:
        exact = torch.maximum(-low, high) / min(-code_low, code_high)
    else:
        exact = (high - low) / (code_high - code_low)
    exact = torch.where(exact == 0, torch.ones_like(exact), exact)
    scale = stored_scale(exact, spec, check)
    if spec.symmetric:
        return scale, None
    values = scale_values(scale, spec)
    # A quantized scale may be smaller than the exact one, or 0.
    step = torch.where(values > 0, values, torch.ones_like(values)).to(torch.float64)
    zero_point = torch.round(code_low - low / step).clamp(code_low, code_high).to(spec.number.dtype)
    return scale, zero_point


def stored_scale(exact: Tensor, spec: QuantSpec, check: bool = True) -> Tensor | QTensor:
    """Positive scales as the spec keeps them."""
    dtype = scale_dtype(spec)
    exact = exact.clamp(min=torch.finfo(dtype).tiny)
    return exact.to(dtype) if spec.scale is None else quantize(exact.to(torch.float32), spec.scale, check)


def scale_values(scale: Tensor | QTensor, spec: QuantSpec) -> Tensor:
    """What scales kept in this way are worth, as float32: those of two levels rounded to the dtype that the spec names."""
    values = dequantize(scale, scale_dtype(spec)) if isinstance(scale, QTensor) else scale
    return values.to(torch.float32)


def one_level(q: QTensor) -> QTensor:
    """The same numbers with scales of one level, as kernels read them."""
    if isinstance(q.scale, Tensor):
        return q
    return replace(q, scale=q.scale_values.to(scale_dtype(q.spec)), spec=replace(q.spec, scale=None))


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype that ``spec.scale_dtype`` names."""
    return cast(torch.dtype, getattr(torch, spec.scale_dtype))


def scale_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scale for a tensor of this shape. Reduced axes have length 1; a group axis has one entry a group."""
    if granularity.kind == "tensor":
        return (1,) * len(shape)
    if granularity.kind == "token":
        return (*shape[:-1], 1)
    if granularity.kind == "group":
        return (*shape[:-1], -(-shape[-1] // granularity.group_size))
    if not -len(shape) <= granularity.axis < len(shape):
        raise PlanError(f"channel axis {granularity.axis} is outside a tensor of {len(shape)} axes.")
    return tuple(size if axis == granularity.axis % len(shape) else 1 for axis, size in enumerate(shape))


def empty(shape: tuple[int, ...], spec: QuantSpec, device: str | torch.device = "meta") -> QTensor:
    """A QTensor with the right buffers and no meaning yet, to be filled from a file."""
    packed = torch.empty(packed_shape(shape, spec.number), dtype=packed_dtype(spec.number), device=device)
    blocks = scale_shape(shape, spec.granularity)
    scale: Tensor | QTensor
    if spec.scale is None:
        scale = torch.empty(blocks, dtype=getattr(torch, spec.scale_dtype), device=device)
    else:
        scale = empty(blocks, spec.scale, device)
    zero_point = None if spec.symmetric else torch.empty(blocks, dtype=spec.number.dtype, device=device)
    return QTensor(packed, scale, zero_point, spec, shape)


def parts(q: QTensor, name: str) -> dict[str, Tensor]:
    """The tensors of ``q`` under the names that layers and files have for them: NAME_packed, NAME_scale, NAME_zero_point.

    Of two-level scales NAME_scale_packed, NAME_scale_scale and so on.
    """
    return {f"{name}_packed": q.packed, **grid_parts(q.scale, q.zero_point, f"{name}_")}


def grid_parts(scale: Tensor | QTensor, zero_point: Tensor | None, prefix: str) -> dict[str, Tensor]:
    """Scale and zero point under such names."""
    scales = parts(scale, f"{prefix}scale") if isinstance(scale, QTensor) else {f"{prefix}scale": scale}
    return scales if zero_point is None else {**scales, f"{prefix}zero_point": zero_point}


def by_rows(spec: QuantSpec) -> bool:
    """Whether no scale of a matrix spans two of its rows, so that they can be quantized apart."""
    kind, axis = spec.granularity.kind, spec.granularity.axis
    own = kind in ("group", "token") or (kind == "channel" and axis in (0, -2))
    return own and (spec.scale is None or by_rows(spec.scale))


def rows(q: QTensor, which: Tensor | slice) -> QTensor:
    """Some rows of a matrix ``[rows, columns]``: a slice of them, or those of the indices ``[n]``. Scales that all rows share
    stay shared."""

    def chosen(x: Tensor) -> Tensor:
        return x[which] if isinstance(which, slice) else x.index_select(0, which)

    packed, scale, zero_point = chosen(q.packed), q.scale, q.zero_point
    if scale.shape[0] > 1:
        scale = rows(scale, which) if isinstance(scale, QTensor) else chosen(scale)
    if zero_point is not None and zero_point.shape[0] > 1:
        zero_point = chosen(zero_point)
    return QTensor(packed, scale, zero_point, q.spec, (len(packed), *q.shape[1:]))


def joined(pieces: Sequence[QTensor]) -> QTensor:
    """The matrix of these rows, none of whose scales spans two pieces: see ``by_rows``."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first.scale, Tensor):
        scale: Tensor | QTensor = torch.cat([cast(Tensor, q.scale) for q in pieces])
    else:
        scale = joined([cast(QTensor, q.scale) for q in pieces])
    zero_point = None if first.zero_point is None else torch.cat([cast(Tensor, q.zero_point) for q in pieces])
    shape = (sum(q.shape[0] for q in pieces), *first.shape[1:])
    return QTensor(torch.cat([q.packed for q in pieces]), scale, zero_point, first.spec, shape)


def packed_shape(shape: tuple[int, ...], number: Format) -> tuple[int, ...]:
    """The shape of the packed codes of a tensor of this shape."""
    return shape if number.bits == 8 else (*shape[:-1], -(-shape[-1] // (32 // number.bits)))


def packed_dtype(number: Format) -> torch.dtype:
    """The dtype of packed codes."""
    return number.dtype if number.bits == 8 else torch.int32


def pack(codes: Tensor, number: Format) -> Tensor:
    """Codes to storage. As many codes as fit whole go to an int32 along the last axis, eight of 4 bits or five of 6, the first
    in the lowest bits, as code - code_min.

    Layout of compressed-tensors' pack-quantized format. The last word is filled up with zero bits.
    """
    if number.bits == 8:
        return codes.contiguous()
    per_word = 32 // number.bits
    unsigned = codes.to(torch.int32) - number.code_min
    if missing := -codes.shape[-1] % per_word:
        unsigned = torch.nn.functional.pad(unsigned, (0, missing))
    fields = unsigned.reshape(*codes.shape[:-1], unsigned.shape[-1] // per_word, per_word)
    return (fields << _shifts(number, codes.device)).sum(-1, dtype=torch.int32)  # bits of no two codes meet


def unpack(packed: Tensor, number: Format, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``pack``: codes of ``shape``."""
    if number.bits == 8:
        return packed
    fields = (packed.unsqueeze(-1) >> _shifts(number, packed.device)) & (2**number.bits - 1)
    length = packed.shape[-1] * (32 // number.bits)
    return (fields.reshape(*shape[:-1], length)[..., : shape[-1]] + number.code_min).to(number.dtype)


def _shifts(number: Format, device: torch.device) -> Tensor:
    return torch.arange(0, 32 // number.bits * number.bits, number.bits, dtype=torch.int32, device=device)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def _blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` with a group's elements on an axis of their own; a short last group is filled up with zeros."""
    if granularity.kind != "group":
        return x
    size = granularity.group_size
    missing = -x.shape[-1] % size
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)


def _unblocked(view: Tensor, shape: torch.Size, granularity: Granularity) -> Tensor:
    if granularity.kind != "group":
        return view
    length = view.shape[-2] * view.shape[-1]
    return view.reshape(*shape[:-1], length)[..., : shape[-1]]


def _aligned(scale: Tensor, granularity: Granularity) -> Tensor:
    return scale.unsqueeze(-1) if granularity.kind == "group" else scale


def _reduced_axes(ndim: int, granularity: Granularity) -> list[int]:
    if granularity.kind == "tensor":
        return list(range(ndim))
    if granularity.kind == "channel":
        return [axis for axis in range(ndim) if axis != granularity.axis % ndim]
    return [ndim - 1]
