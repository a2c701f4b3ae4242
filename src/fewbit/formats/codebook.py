"""Codebooks: the code is an index into a short table of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats.format import Format


@dataclass(frozen=True)
class Codebook(Format):
    """The nearest of 2**bits ascending values, one of which is 0. A tie goes to the lower value."""

    values: tuple[float, ...]

    @property
    def is_integer(self) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def code_min(self) -> int:
        return 0

    def bound(self, symmetric: bool) -> tuple[float, float]:
        return self.values[0], self.values[-1]

    def encode(self, values: Tensor) -> Tensor:
        table = torch.tensor(self.values, device=values.device, dtype=torch.float64)
        middles = ((table[1:] + table[:-1]) / 2).to(values.dtype)
        return torch.bucketize(values.contiguous(), middles).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        table = torch.tensor(self.values, device=codes.device, dtype=torch.float32)
        return table[codes.to(torch.int64)]


# Quantiles of a normal distribution, zero exact: QLoRA (https://arxiv.org/abs/2305.14314), appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
