"""Every way to make one linear layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import fewbit
from peers.layer import Layer
from peers.llama_cpp import llama_cpp_q4
from peers.onnxruntime import onnx_int4, onnx_int8
from peers.openvino import openvino_int4, openvino_int8
from peers.pytorch import torch_ao_int8, torch_bf16, torch_fp32, torch_int4, torchao_int8
from peers.recipes import fewbit_linear, int4_dynamic, int8_weight_only

LINEAR: dict[str, Callable[[Tensor], Layer]] = {
    "torch FP32": torch_fp32,
    "torch BF16": torch_bf16,
    "torch.ao int8": torch_ao_int8,
    "torch int4 g32": torch_int4,
    "torchao int8": torchao_int8,
    "ONNX Runtime int8": onnx_int8,
    "ONNX Runtime int4 g32": onnx_int4,
    "OpenVINO int8": openvino_int8,
    "OpenVINO int4 g32": openvino_int4,
    "llama.cpp Q4_0": llama_cpp_q4,
    "fewbit W8A8": lambda weight: fewbit_linear(fewbit.load_recipe("int8-dynamic"), weight),
    "fewbit W4A8 g32": lambda weight: fewbit_linear(int4_dynamic(), weight),
    "fewbit W8": lambda weight: fewbit_linear(int8_weight_only(), weight),
    "fewbit W4 g32": lambda weight: fewbit_linear(fewbit.load_recipe("int4-weight-only"), weight),
}
