"""Search of scale and zero point for many blocks at once, by alternating weighted least squares.

    minimize over s, z:  sum_i h_i (w_i - s d_i)^2      d = clamp(round(w / s), low - z, high - z)

Given the codes d + z, the best s is that of a weighted regression, ``sum h w d / sum h d^2``, and the best z the rounded
intercept of one; given s and z, rounding gives the best codes. Several ranges are tried as starts, as in llama.cpp's
quantization of blocks (https://github.com/ggml-org/llama.cpp/pull/1684). Blocks are columns, ``[elements, blocks]``, so
that every step is one pass over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import FORMATS
from fewbit.ops import native
from fewbit.ops.linear import LIBRARY, TAGS, register
from fewbit.spec import Granularity, QuantSpec

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67, 0.6)  # of a block's range: what is beyond it is clipped
SHIFTS = (0, -1, 1)  # of the zero point
ROUNDS = 3


@dataclass(frozen=True)
class Blocks:
    """Weights ``w`` ``[elements, blocks]`` and how much each matters, ``h``, of a shape that expands to theirs; None: all the
    same."""

    w: Tensor
    h: Tensor | None

    def contiguous(self) -> tuple[Tensor, Tensor | None]:
        """Both as operators take them."""
        return self.w.contiguous(), None if self.h is None else self.h.expand_as(self.w).contiguous()

    def sum(self, values: Tensor) -> Tensor:
        """``sum h values`` of each block."""
        return total(values if self.h is None else values * self.h)


def total(values: Tensor) -> Tensor:
    """The sum over the first axis, always in the same order: torch's depends on how many columns there are, and what is found
    for a block must not depend on what else is searched at the time."""
    count = values.shape[0]
    while count > 1:
        first, second, *rest = values.split(count // 2)
        values = first + second
        for row in rest:
            values[:1] += row
        count //= 2
    return values[0]


def as_blocks(matrix: Tensor, granularity: Granularity) -> Tensor:
    """A matrix as ``[elements, blocks]`` in float32, blocks in the order of the scale. Short groups are filled with zeros."""
    matrix = matrix.detach().to(torch.float32)
    if granularity.kind == "tensor":
        return matrix.reshape(-1, 1)
    if granularity.kind == "group":
        size = granularity.group_size
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
        return padded.reshape(-1, size).T.contiguous()
    by_column = granularity.kind == "channel" and granularity.axis % 2 == 1
    return matrix if by_column else matrix.T.contiguous()


def best_grid(blocks: Blocks, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """float32 scale and zero point ``[blocks]`` (0 if symmetric), whatever the precision that scales are kept in."""
    if not spec.number.is_integer:
        return _best_grid(blocks, spec, SHARES, _shifts(spec), ROUNDS)
    w, h = blocks.contiguous()
    shares, shifts = (torch.tensor([own], dtype=torch.float32) for own in (SHARES, _shifts(spec)))
    found: tuple[Tensor, Tensor] = torch.ops.fewbit.search_grid.default(
        w, h, *spec.number.bound(spec.symmetric), spec.symmetric, shares, shifts, ROUNDS
    )
    return found


def _best_grid(
    blocks: Blocks, spec: QuantSpec, shares: Sequence[float], shifts: Sequence[float], rounds: int
) -> tuple[Tensor, Tensor]:
    search = _Search(blocks, spec)
    for share in shares:
        scale = search.full * share
        search.attempt(scale, [search.start + shift for shift in shifts])
    for _ in range(rounds):
        scale, zero = search.regression()
        search.attempt(scale, [zero])
    return search.scale * search.unit, search.zero


def _shifts(spec: QuantSpec) -> tuple[int, ...]:
    return (0,) if spec.symmetric else SHIFTS


def _errors(blocks: Blocks, spec: QuantSpec, scale: Tensor, zeros: Sequence[Tensor]) -> Iterator[Tensor]:
    """``sum h (w - s d)^2`` of each block for each zero point, relative to the square of its largest weight."""
    v = blocks.w * torch.where(scale > 0, 1 / scale, 0)
    rounded, weight = _rounded(v, spec), scale / _peak(blocks.w)
    for zero in zeros:
        e = (v - _within(rounded, spec, zero)).mul_(weight)
        yield torch.where(scale > 0, blocks.sum(e.square_()), torch.inf)


def best_option(blocks: Blocks, spec: QuantSpec, options: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Which of several scales is best for each block, the first of equals, and the best zero point near that scale's own."""
    if not spec.number.is_integer:
        return _best_option(blocks, spec, options, _shifts(spec))
    w, h = blocks.contiguous()
    scale, zero = (torch.stack([x.to(torch.float32) for x in own]) for own in zip(*options, strict=True))
    shifts = torch.tensor([_shifts(spec)], dtype=torch.float32)
    index, best = torch.ops.fewbit.choose_grid.default(
        w, h, scale, zero, *spec.number.bound(spec.symmetric), spec.symmetric, shifts
    )
    return index.to(torch.int64), best


def _best_option(
    blocks: Blocks, spec: QuantSpec, options: Sequence[tuple[Tensor, Tensor]], shifts: Sequence[float]
) -> tuple[Tensor, Tensor]:
    low, high = spec.number.bound(spec.symmetric)
    least = torch.full_like(options[0][1], torch.inf)
    index, best = torch.zeros_like(least, dtype=torch.int64), options[0][1]
    for number, (scale, zero) in enumerate(options):
        zeros = [zero if spec.symmetric else (zero + shift).clamp(low, high) for shift in shifts]
        for shifted, e in zip(zeros, _errors(blocks, spec, scale, zeros), strict=True):
            better = e < least
            least = torch.where(better, e, least)
            index = torch.where(better, number, index)
            best = torch.where(better, shifted, best)
    return index, best


def levels(v: Tensor, spec: QuantSpec, zero: Tensor) -> Tensor:
    """``v`` rounded to what codes stand for at scale 1."""
    return _within(_rounded(v, spec), spec, zero)


def _rounded(v: Tensor, spec: QuantSpec) -> Tensor:
    """``levels`` before it matters where zero is."""
    if not spec.number.is_integer:
        return spec.number.decode(spec.number.encode(v.clamp(*spec.number.bound(spec.symmetric))))
    return v.round()


def _within(rounded: Tensor, spec: QuantSpec, zero: Tensor) -> Tensor:
    if not spec.number.is_integer:
        return rounded
    low, high = spec.number.bound(spec.symmetric)
    return torch.clamp(rounded, low - zero, high - zero)


def _peak(w: Tensor) -> Tensor:
    peak = w.abs().amax(0) if len(w) else w.new_zeros(w.shape[1])
    return torch.where(peak > 0, peak, 1)


class _Search:
    """The best grid so far. Weights are relative to the largest of their block: squares neither over- nor underflow."""

    def __init__(self, blocks: Blocks, spec: QuantSpec) -> None:
        self.spec = spec
        self.unit = _peak(blocks.w)
        self.blocks = Blocks(blocks.w / self.unit, blocks.h)
        u = self.blocks.w
        self.low_code, self.high_code = spec.number.bound(spec.symmetric)
        low, high = u.amin(0).clamp(max=0), u.amax(0).clamp(min=0)
        if spec.symmetric:
            self.full = torch.maximum(-low, high) / min(-self.low_code, self.high_code)
            self.start = torch.zeros_like(low)
        else:
            self.full = (high - low) / (self.high_code - self.low_code)
            self.start = (self.low_code - low / torch.where(self.full > 0, self.full, 1)).round()
        self.full = torch.where(self.full > 0, self.full, 1 / self.unit)  # a block of zeros has scale 1
        self.scale, self.zero = self.full, self.start
        self.gain = torch.full_like(low, -torch.inf)

    def attempt(self, scale: Tensor, zeros: Sequence[Tensor]) -> None:
        """Codes of these grids with the scale that fits them best; kept where they are the best so far."""
        rounded = _rounded(self.blocks.w / scale, self.spec)
        for zero in zeros:
            if not self.spec.symmetric:
                zero = zero.clamp(self.low_code, self.high_code)
            d = _within(rounded, self.spec, zero)
            hd = d if self.blocks.h is None else d * self.blocks.h
            wd, dd = total(hd * self.blocks.w), total(hd * d)
            fits = (dd > 0) & (wd > 0)
            gain = torch.where(fits, wd.square() / dd, 0)  # how much less than sum h w^2 the error is
            better = gain > self.gain
            self.gain = torch.where(better, gain, self.gain)
            self.scale = torch.where(better, torch.where(fits, wd / dd, scale), self.scale)
            self.zero = torch.where(better, zero, self.zero)

    def regression(self) -> tuple[Tensor, Tensor]:
        """Slope and intercept of the weights over the codes of the best grid."""
        if self.spec.symmetric:
            return self.scale, self.zero
        sums, u = self.blocks.sum, self.blocks.w
        d = levels(u / self.scale, self.spec, self.zero)
        one = float(len(u)) if self.blocks.h is None else total(self.blocks.h)
        sd, sdd, sw, swd = sums(d), sums(d * d), sums(u), sums(u * d)
        determinant = one * sdd - sd.square()
        slope = (one * swd - sd * sw) / determinant
        usable = (determinant > 0) & (slope > 0) & slope.isfinite()
        slope = torch.where(usable, slope, self.scale)
        intercept = (sw - slope * sd) / one
        zero = (self.zero - intercept / slope).round()
        return slope, torch.where(usable & zero.isfinite(), zero, self.zero)


def _spec(low: float, high: float, symmetric: bool) -> QuantSpec:
    """One with these codes."""
    bounds = {name: number.bound(symmetric) for name, number in FORMATS.items() if number.is_integer}
    return QuantSpec(next(name for name, bound in bounds.items() if bound == (low, high)), symmetric=symmetric)


def _search_grid(
    w: Tensor, h: Tensor | None, low: float, high: float, symmetric: bool, shares: Tensor, shifts: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    native.remind(w)
    return _best_grid(Blocks(w, h), _spec(low, high, symmetric), shares[0].tolist(), shifts[0].tolist(), rounds)


def _choose_grid(
    w: Tensor, h: Tensor | None, scale: Tensor, zero: Tensor, low: float, high: float, symmetric: bool, shifts: Tensor
) -> tuple[Tensor, Tensor]:
    native.remind(w)
    options = list(zip(scale, zero, strict=True))
    index, best = _best_option(Blocks(w, h), _spec(low, high, symmetric), options, shifts[0].tolist())
    return index.to(torch.float32), best


_CODES = "float low, float high, bool symmetric"
# w and h are [elements, blocks], shares and shifts rows of constants, the results [blocks].
LIBRARY.define(
    f"search_grid(Tensor w, Tensor? h, {_CODES}, Tensor shares, Tensor shifts, int rounds) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    f"choose_grid(Tensor w, Tensor? h, Tensor scale, Tensor zero, {_CODES}, Tensor shifts) -> (Tensor, Tensor)",
    tags=TAGS,
)
register("search_grid", _search_grid, lambda w, *_: (w.new_empty(w.shape[1]), w.new_empty(w.shape[1])))
register("choose_grid", _choose_grid, lambda w, *_: (w.new_empty(w.shape[1]), w.new_empty(w.shape[1])))
