"""Quantized modules with plain buffers: one file a layer type, one line an entry in LAYERS; their twins for training."""

from __future__ import annotations

from fewbit.nn.conv import Conv
from fewbit.nn.embedding import Embedding, EmbeddingBag
from fewbit.nn.experts import Experts
from fewbit.nn.layer import QuantizedLayer, input_placeholder
from fewbit.nn.layers import LAYERS, float_class, kind_of, layer_class, qualified_name
from fewbit.nn.linear import FusedLinear, Linear
from fewbit.nn.recurrent import GRU, LSTM
from fewbit.nn.student import LearnedGrid, Student, student_class

__all__ = [
    "GRU",
    "LAYERS",
    "LSTM",
    "Conv",
    "Embedding",
    "EmbeddingBag",
    "Experts",
    "FusedLinear",
    "LearnedGrid",
    "Linear",
    "QuantizedLayer",
    "Student",
    "float_class",
    "input_placeholder",
    "kind_of",
    "layer_class",
    "qualified_name",
    "student_class",
]
