"""Arithmetic on quantized tensors: schema, plain-torch reference, compiled kernels where there are some."""

from __future__ import annotations

from fewbit.ops.conv import Geometry, conv
from fewbit.ops.embedding import embedding
from fewbit.ops.linear import linear
from fewbit.ops.recurrent import recurrent

__all__ = ["Geometry", "conv", "embedding", "linear", "recurrent"]
