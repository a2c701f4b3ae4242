"""What a number format is: a code for one number at scale 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format(ABC):
    """How one number is coded at scale 1.

    For every code c: ``encode(decode(c)) == c``. ``decode`` is monotone in c for integers. Some code decodes to 0 exactly.
    """

    name: str
    bits: int

    @property
    @abstractmethod
    def is_integer(self) -> bool:
        """Whether codes are the values themselves, so that a zero point and integer arithmetic make sense."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of unpacked codes, one element a code."""

    @property
    @abstractmethod
    def code_min(self) -> int:
        """The smallest code; codes are code_min .. code_min + 2**bits - 1."""

    @abstractmethod
    def bound(self, symmetric: bool) -> tuple[float, float]:
        """The smallest and largest value that a code may stand for."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Values within ``bound`` to the nearest codes, of ``dtype``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes to float32 values."""
