"""OpenVINO."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers.layer import UNLIMITED, Layer, int4_codes, nibbles

# OpenVINO and NNCF report who uses them unless this package cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@functools.cache
def openvino_core() -> Any:
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        # torch's oneDNN reads the limit once, in its first operation; OpenVINO's must not see it.
        torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))
        del os.environ["ONEDNN_MAX_CPU_ISA"]
    import openvino

    return openvino.Core()


def openvino_compiled(model: Any, **settings: Any) -> Any:
    threads = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    return openvino_core().compile_model(model, "CPU", {**threads, **settings})


class OpenvinoModule(nn.Module):
    """A compiled ONNX model as a module whose inputs are named as in the model."""

    def __init__(self, model: bytes, **settings: Any) -> None:
        super().__init__()
        openvino_core()
        import openvino

        self.request = openvino_compiled(openvino.convert_model(io.BytesIO(model)), **settings).create_infer_request()

    def forward(self, **inputs: Tensor) -> Tensor:
        feed = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.request.infer(feed)[0].copy())


def openvino_layer(node: Any, x: Any, nbytes: float, *owners: Any) -> Layer:
    """With the plugin's defaults: activations are quantized on the fly in groups of 32 where the CPU allows it.

    ``owners`` hold the memory of the constants.
    """
    import openvino
    from openvino import opset13

    model = openvino.Model([opset13.matmul(x, node, False, True)], [x])
    request = openvino_compiled(model).create_infer_request()

    def bind(x: Tensor) -> Callable[[], Any]:
        tensor = openvino.Tensor(x.numpy(), shared_memory=True)

        def run() -> Any:
            request.set_input_tensor(tensor)
            request.infer()
            return request.get_output_tensor().data

        run.keep = owners  # type: ignore[attr-defined]
        return run

    return Layer(bind, nbytes, UNLIMITED)


def openvino_int8(weight: Tensor) -> Layer:
    from openvino import opset13

    scale = (weight.abs().amax(1, keepdim=True) / 127).numpy()
    codes = np.round(weight.numpy() / scale).astype(np.int8)
    node = opset13.multiply(opset13.convert(opset13.constant(codes), "f16"), opset13.constant(scale.astype(np.float16)))
    x = opset13.parameter([-1, weight.shape[1]], np.float32)
    return openvino_layer(opset13.convert(node, "f32"), x, weight.numel() + 2 * len(weight))


def openvino_int4(weight: Tensor) -> Layer:
    import openvino
    from openvino import Type, opset13

    codes, scale = int4_codes(weight)
    packed, eight = nibbles(codes), np.array([8], np.uint8)

    def half(data: np.ndarray, shape: tuple[int, ...]) -> Any:
        return opset13.convert(opset13.constant(openvino.Tensor(data, openvino.Shape(shape), Type.u4)), "f16")

    node = opset13.subtract(half(packed, codes.shape), half(eight, (1, 1, 1)))
    node = opset13.multiply(node, opset13.constant(scale[..., None].astype(np.float16)))
    node = opset13.convert(opset13.reshape(node, opset13.constant(list(weight.shape)), False), "f32")
    x = opset13.parameter([-1, weight.shape[1]], np.float32)
    return openvino_layer(node, x, packed.nbytes + 2 * scale.size, packed, eight)
