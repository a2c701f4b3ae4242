"""Integer constants back to float, one scale a channel: what a graph holds in place of float weights and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.ops.linear import LIBRARY, TAGS, register, same_device

LIBRARY.define("dequantize_channels(Tensor codes, Tensor scale) -> Tensor", tags=TAGS)


def _dequantize_channels(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))


def _fake(codes: Tensor, scale: Tensor) -> Tensor:
    same_device(codes, scale)
    return codes.new_empty(codes.shape, dtype=torch.float32)


register("dequantize_channels", _dequantize_channels, _fake)
