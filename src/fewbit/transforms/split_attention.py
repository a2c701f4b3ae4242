"""torch.nn.MultiheadAttention as the linear layers it is made of.

torch's attention and the fast path of TransformerEncoderLayer read weights without calling the layers that own them, so a
quantized layer inside would be passed by. After the split every projection is an nn.Linear that is called.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class MultiheadAttention(nn.Module):
    """The arguments and results of torch.nn.MultiheadAttention, with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``."""

    # TransformerEncoderLayer and TransformerEncoder look at these and then take their slow, equivalent path.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim: int = attention.embed_dim
        self.num_heads: int = attention.num_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.batch_first: bool = attention.batch_first
        self.dropout: float = attention.dropout
        self.add_zero_attn: bool = attention.add_zero_attn
        weights: Any = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if attention.in_proj_weight is None
            else attention.in_proj_weight.chunk(3)
        )
        biases: Any = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given with it.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        added = 0  # keys beyond those given: always attended to
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
            added += 1
        if self.add_zero_attn:
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            added += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(q, attn_mask, key_padding_mask, added)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = torch.nn.functional.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding_mask: Tensor | None, added: int) -> Tensor | None:
        """One float mask to add to the scores ``[batch, heads, queries, keys]``."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _additive(attn_mask, q.dtype)
            if total.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads))
        if padding_mask is not None:
            padding = _additive(padding_mask, q.dtype)[:, None, None, :]
            total = padding if total is None else total + padding
        return total if total is None else torch.nn.functional.pad(total, (0, added))


def find_attention(model: nn.Module) -> list[str]:
    """The names of all torch.nn.MultiheadAttention in ``model`` that nobody hooked."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention and not module._forward_hooks and not module._forward_pre_hooks
    ]


def split_attention(model: nn.Module, names: list[str]) -> nn.Module:
    """Replace the attentions of these names in place; returns the model (another object if the model is an attention)."""
    for name in names:
        attention = model.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        replacement = MultiheadAttention(attention)
        if name == "":
            return replacement
        # One module under two names stays one.
        for parent in model.modules():
            for child, module in parent._modules.items():
                if module is attention:
                    parent._modules[child] = replacement
    for module in model.modules():
        # Its nested tensors are for the fast path only.
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
