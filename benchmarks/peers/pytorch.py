"""PyTorch: float, torch.ao, ATen's 4-bit weights, torchao."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peers.layer import GROUP, Layer, from_module, int4_codes, linear

for talkative in ("torchao", "torch.utils._pytree"):  # CUDA libraries that cannot be loaded; a deprecation
    logging.getLogger(talkative).setLevel(logging.CRITICAL)


def torch_ao_dynamic(model: nn.Module, inplace: bool = False) -> nn.Module:
    """torch.ao's dynamic int8 (fbgemm)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {nn.Linear, nn.LSTM, nn.GRU}
        return torch.ao.quantization.quantize_dynamic(model, kinds, torch.qint8, inplace=inplace)


def torch_fp32(weight: Tensor) -> Layer:
    return from_module(linear(weight.clone()))  # a copy: with its own place in memory


def torch_bf16(weight: Tensor) -> Layer:
    return from_module(linear(weight.bfloat16()), dtype=torch.bfloat16)


def torch_ao_int8(weight: Tensor) -> Layer:
    module = torch_ao_dynamic(nn.Sequential(linear(weight)))
    return from_module(module, weight.numel() + 8 * len(weight))


def torch_int4(weight: Tensor) -> Layer:
    """ATen's 4-bit weights in groups of 32, bfloat16 activations."""
    codes, scale = int4_codes(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes).int().reshape(weight.shape), 1)
    # w = (code - 8) * scale + zero
    scale_and_zero = torch.stack([torch.from_numpy(scale).T, torch.zeros(scale.T.shape)], 2).bfloat16().contiguous()

    def bind(x: Tensor) -> Callable[[], Any]:
        return functools.partial(
            torch.ops.aten._weight_int4pack_mm_for_cpu, x.bfloat16(), packed, GROUP, scale_and_zero
        )

    return Layer(bind, packed.nbytes + scale_and_zero.nbytes)


def torchao_int8(weight: Tensor) -> Layer:
    """torchao's dynamic int8, eager: its tensor subclass costs about a millisecond a call."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = nn.Sequential(linear(weight.clone()))
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return from_module(module, weight.numel() + 4 * len(weight))
