"""OpenVINO on the CPU: it reads the file that ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.batches import Call
from fewbit.targets.onnx import onnx_model
from fewbit.targets.target import Operator, Target, tensors_of

MOVES = {"Const", "Input", "Output", "Reorder", "Reshape", "Transpose", "FakeQuantize", "Convert"}


class OpenVino(Target):
    """Compiled for the batch size of each call's inputs, at its first such call."""

    name = "openvino"
    packages = ("onnx", "onnxscript", "openvino")
    extra = "openvino"

    def compile(self, module: GraphModule, call: Call) -> tuple[Callable[..., Any], tuple[Operator, ...]]:
        import openvino

        proto = onnx_model(module, call)
        core = openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # what is not int8: bfloat16 would be another model
        }
        source = proto.SerializeToString()
        outputs = range(len(proto.graph.output))
        compiled: dict[tuple[Any, ...], Any] = {}

        def request(tensors: tuple[Tensor, ...]) -> Any:
            shapes = tuple(x.shape for x in tensors)
            if shapes not in compiled:
                model = core.read_model(source)
                model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
                compiled[shapes] = core.compile_model(model, "CPU", settings).create_infer_request()
            return compiled[shapes]

        def run(*tensors: Tensor) -> list[Tensor]:
            here = request(tensors)
            arrays = [x.detach().contiguous().numpy() for x in tensors]  # in memory until it has run
            for index, array in enumerate(arrays):
                here.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
            here.infer()
            # Copies: the next call writes to the same memory.
            return [torch.from_numpy(here.get_output_tensor(index).data.copy()) for index in outputs]

        model = request(tuple(tensors_of(call))).get_compiled_model().get_runtime_model()
        infos = [(node.get_friendly_name(), node.get_rt_info()) for node in model.get_ordered_ops()]
        kinds = [(name, str(i["layerType"].astype(str)), str(i["runtimePrecision"].astype(str))) for name, i in infos]
        return run, tuple(Operator(name, kind, bits in ("u8", "i8")) for name, kind, bits in kinds if kind not in MOVES)
