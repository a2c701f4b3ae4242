"""The ways to quantize that the benchmarks put beside fewbit.

``LINEAR`` maps a name to a function that makes one linear layer without bias from its weights, ``CNN`` to one that makes a
whole CNN. The other functions make whole models. Whoever cannot be kept below AVX-512 (see ``measure.LIMITS``) says so in
``isa``.
"""

from __future__ import annotations

from peers.cnn import CNN, preload
from peers.layer import UNLIMITED, Layer
from peers.linear import LINEAR
from peers.llama_cpp import ggml_rounded, llama_cpp_decode, q4_k_m, write_gguf
from peers.onnxruntime import OnnxModule, onnx_dynamic, onnx_export
from peers.openvino import OpenvinoModule
from peers.pytorch import torch_ao_dynamic
from peers.qat import QAT
from peers.recipes import int4_dynamic, rounded

__all__ = [
    "CNN",
    "LINEAR",
    "QAT",
    "UNLIMITED",
    "Layer",
    "OnnxModule",
    "OpenvinoModule",
    "ggml_rounded",
    "int4_dynamic",
    "llama_cpp_decode",
    "onnx_dynamic",
    "onnx_export",
    "preload",
    "q4_k_m",
    "rounded",
    "torch_ao_dynamic",
    "write_gguf",
]
