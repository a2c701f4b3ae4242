"""Keys and values of attention in int8, for transformers' generate: a quarter of the memory of float32, half of bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import UnsupportedError
from fewbit.qtensor import QTensor, dequantize, quantize
from fewbit.spec import PER_TOKEN, QuantSpec

SPEC = QuantSpec("int8", PER_TOKEN)
SCALE = 4  # bytes of a float32


def int8_cache(model: nn.Module) -> Any:
    """An empty cache for ``model``, a language model of transformers; ``generate`` takes it as ``past_key_values``.

    Keys and values are int8 with one float32 scale a token and head, whose absolute maximum it covers; attention reads them
    in the model's dtype. Layers of other kinds than full attention (sliding windows, state spaces) keep what transformers
    keeps. UnsupportedError for a model without a configuration of transformers, or without full attention.
    """
    try:
        from transformers.cache_utils import DynamicCache, DynamicLayer
    except ImportError:
        raise UnsupportedError("int8_cache needs transformers: pip install 'fewbit[hf]'.") from None
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedError(f"int8_cache needs a language model of transformers, found a {type(model).__name__}.")
    cache = DynamicCache(config=config)
    kept = [_int8_layer()() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if not any(type(layer) is _int8_layer() for layer in kept):
        raise UnsupportedError(f"int8_cache: no layer of this {type(model).__name__} keeps all keys and values.")
    cache.layers = kept
    return cache


@functools.cache
def _int8_layer() -> type:
    from transformers.cache_utils import DynamicLayer

    class Int8Layer(DynamicLayer):
        """Codes ``[batch, heads, tokens, size]`` with the bytes of their scale behind them, so that whatever transformers does
        to keys and values along the other axes does it to both."""

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = _packed(key_states[..., :0, :]), _packed(value_states[..., :0, :])
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None and self.values is not None
            self.keys = torch.cat([self.keys, _packed(key_states)], dim=-2)
            self.values = torch.cat([self.values, _packed(value_states)], dim=-2)
            return _values(self.keys, self.dtype), _values(self.values, self.dtype)

    return Int8Layer


def _packed(x: Tensor) -> Tensor:
    """int8 ``[..., size + SCALE]``."""
    q = quantize(x, SPEC, check=False)
    assert isinstance(q.scale, Tensor)
    return torch.cat([q.packed, q.scale.contiguous().view(torch.int8)], dim=-1)


def _values(packed: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = packed[..., :-SCALE], packed[..., -SCALE:].contiguous().view(torch.float32)
    return dequantize(QTensor(codes, scale, None, SPEC, tuple(codes.shape)), dtype)
