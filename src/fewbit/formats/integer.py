"""Two's complement and unsigned integers: the code is the value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats.format import Format


@dataclass(frozen=True)
class Integer(Format):
    """A signed or unsigned integer. Rounds half to even.

    ``narrow`` leaves out the most negative code in symmetric use, so that the codes of x and -x mirror each other and
    |code| fits the unsigned operand of AVX2's vpmaddubsw without overflow.
    """

    signed: bool
    narrow: bool = False

    @property
    def is_integer(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    @property
    def code_min(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    def bound(self, symmetric: bool) -> tuple[float, float]:
        low = self.code_min + (1 if self.narrow and symmetric else 0)
        return float(low), float(self.code_min + 2**self.bits - 1)

    def encode(self, values: Tensor) -> Tensor:
        return torch.round(values).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)
