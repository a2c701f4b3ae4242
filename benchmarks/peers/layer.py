"""One linear layer as every peer gives it, and the codes that the 4-bit ones share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbit.targets import tensor_bytes
from measure import ISA

GROUP = 32
# OpenVINO 2026.4 fails with ONEDNN_MAX_CPU_ISA=AVX2 on a CPU with AVX-512, and ONNX Runtime 1.32 has no such switch.
UNLIMITED = "native"


@dataclass(frozen=True)
class Layer:
    """One linear layer: ``bind`` an input ``[M, K]`` for a function that returns ``[M, N]``; bytes of weights and scales."""

    bind: Callable[[Tensor], Callable[[], Any]]
    nbytes: float
    isa: str = ISA


def from_module(module: nn.Module, nbytes: float | None = None, dtype: torch.dtype = torch.float32) -> Layer:
    def bind(x: Tensor) -> Callable[[], Any]:
        return functools.partial(module, x.to(dtype))

    return Layer(bind, tensor_bytes(module) if nbytes is None else nbytes)


def linear(weight: Tensor) -> nn.Linear:
    """The weights as nn.Linear, in eval mode; they are not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.eval()


def int4_codes(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0 to 15 ``[N, groups, 32]`` and scales ``[N, groups]``: (code - 8) * scale."""
    groups = weight.view(len(weight), -1, GROUP).numpy()
    scale = np.abs(groups).max(2) / 7
    return (np.clip(np.round(groups / scale[..., None]), -8, 7) + 8).astype(np.uint8), scale


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4
