"""Embedding tables and bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops import embedding
from fewbit.qtensor import dequantize


class Table(QuantizedLayer):
    """What Embedding and EmbeddingBag share: rows in the dtype of the float table."""

    accepts_input_spec = False

    @staticmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": weight}

    @staticmethod
    def refuse(module: nn.Module) -> str | None:
        return "max_norm rescales rows of the float table in forward" if module.max_norm is not None else None

    def _adopt(self, module: nn.Module) -> None:
        settings: Any = module
        self.num_embeddings, self.embedding_dim = self._shapes["weight"]
        self.padding_idx: int | None = settings.padding_idx
        if isinstance(module, nn.EmbeddingBag):
            self.mode: str = settings.mode
            self.include_last_offset: bool = settings.include_last_offset

    @property
    def weight(self) -> Tensor:
        """The table dequantized, for code that reads it. Read only: a change to it is lost."""
        return dequantize(self.qtensor(), self.dtype)


class Embedding(Table):
    """Indices ``[...]`` to ``[..., embedding_dim]``."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.qtensor()).to(self.dtype)


class EmbeddingBag(Table):
    """Sums, means or maxima of embedding rows; the arguments of torch.nn.EmbeddingBag."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        values = embedding(input.reshape(-1), self.qtensor()).to(self.dtype)
        return bags(self, input, values, offsets, per_sample_weights)


def bags(
    layer: Any, input: Tensor, values: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> Tensor:
    """What torch.nn.EmbeddingBag makes of ``values``, the rows of its table that ``input`` names, ``[n, columns]``."""
    # The rows that are used become the table of a float bag. An extra row stands for padding, which bags leave out.
    places = torch.arange(values.shape[0], device=values.device).reshape(input.shape)
    padding = None
    if layer.padding_idx is not None:
        padding = values.shape[0]
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
        places = torch.where(input == layer.padding_idx, padding, places)
    return torch.nn.functional.embedding_bag(
        places,
        values,
        offsets,
        mode=layer.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=padding,
    )
