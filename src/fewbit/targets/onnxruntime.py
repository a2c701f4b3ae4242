"""ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.batches import Call
from fewbit.targets.onnx import onnx_model
from fewbit.targets.target import Operator, Target

INT8 = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention", "DynamicQuantize")
MOVES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}


class OnnxRuntime(Target):
    """A file with QuantizeLinear and DequantizeLinear, which ONNX Runtime fuses to QLinearConv and the like."""

    name = "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnxruntime"
    wide_sums = False

    def compile(self, module: GraphModule, call: Call) -> tuple[Callable[..., Any], tuple[Operator, ...]]:
        import onnx
        import onnxruntime

        proto = onnx_model(module, call)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder, "optimized.onnx")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls the CPU is others'
            options.optimized_model_filepath = str(optimized)
            source = proto.SerializeToString()
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            nodes = onnx.load(optimized).graph.node
        operators = tuple(
            Operator(node.name, node.op_type, node.op_type.startswith(INT8) or _on_codes(node.op_type))
            for node in nodes
            if node.op_type not in MOVES
        )
        names = [item.name for item in session.get_inputs()]

        def run(*tensors: Tensor) -> list[Tensor]:
            arrays = {name: x.detach().numpy() for name, x in zip(names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, arrays)]

        return run, operators


def _on_codes(kind: str) -> bool:
    return kind in ("NhwcMaxPool",)
