"""Pairs of eight-bit weights that no engine's int16 sums can saturate.

x86 CPUs without VNNI multiply unsigned activations with signed weights by vpmaddubsw, which adds two neighbouring products
and saturates at int16: 255 * 127 * 2 is twice too much. Here the codes of each pair of weights that engines add this way are
bounded: positive ones to 128 together, negative ones to -128 (255 * 128 = 32640 < 32768). The same model then gives the same
sums with and without VNNI, on ARM, in ONNX Runtime and in OpenVINO. It costs a few pairs a little, where 7-bit weights
("reduce_range") cost every weight a bit. Bounds on the accumulator as constraints: A2Q (https://arxiv.org/abs/2308.13504).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.ops import native
from fewbit.ops.linear import LIBRARY, TAGS, register
from fewbit.spec import QuantSpec, per_channel

LIMIT = 128  # of the sum of a pair's codes of one sign


def has_pairs(spec: QuantSpec) -> bool:
    """Whether engines add products of such weights in int16."""
    return (spec.format, spec.granularity, spec.symmetric, spec.scale) == ("int8", per_channel(0), True, None)


def bounded(codes: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
    """int8 ``codes`` ``[rows, columns]`` with what a pair has too much taken from its two codes, half each.

    ``pairs``: sets of disjoint pairs of columns, each ``[P, 2]``. Codes only get smaller, so that no set undoes another.
    """
    for columns in pairs:
        codes = torch.ops.fewbit.bound_pairs.default(codes.contiguous(), columns, LIMIT)
    return codes


def _bound_pairs(codes: Tensor, pairs: Tensor, limit: int) -> Tensor:
    native.remind(codes)
    codes = codes.to(torch.int16)
    chosen = codes[:, pairs]
    for sign in (1, -1):
        excess = ((chosen * sign).clamp(min=0).sum(2) - limit).clamp(min=0).to(torch.int16)
        half = (excess + 1) // 2
        chosen = chosen - sign * torch.stack([half, excess - half], 2)
    codes[:, pairs] = chosen
    return codes.to(torch.int8)


LIBRARY.define("bound_pairs(Tensor codes, Tensor pairs, int limit) -> Tensor", tags=TAGS)
register("bound_pairs", _bound_pairs, lambda codes, *_: torch.empty_like(codes))


def saturates(codes: Tensor, pairs: tuple[Tensor, ...]) -> bool:
    """Whether some pair could leave int16 with activations from 0 to 255."""
    wide = codes.to(torch.int32)
    for columns in pairs:
        chosen = wide[:, columns]
        if bool((255 * chosen.clamp(min=0).sum(2) > 32767).any() or (255 * chosen.clamp(max=0).sum(2) < -32768).any()):
            return True
    return False
