"""ONNX Runtime."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers.layer import GROUP, UNLIMITED, Layer, int4_codes, nibbles


def onnx_session(model: bytes | str, threads: int | None = None) -> Any:
    """A session whose idle threads sleep: spinning, as they do by default, they take the CPU from whoever is measured next."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def onnx_model(node: Any, weights: dict[str, np.ndarray], inputs: list[Any], outputs: list[Any]) -> Any:
    """A model of one node."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def onnx_dynamic(model: bytes) -> bytes:
    """ONNX Runtime's own dynamic int8, per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet_logging():
        file = Path(folder) / "int8.onnx"
        quantize_dynamic(onnx.load_from_string(model), file, per_channel=True, weight_type=QuantType.QInt8)
        return file.read_bytes()


def onnx_export(model: nn.Module, inputs: tuple[Any, ...], names: list[str], dynamic_shapes: Any = None) -> bytes:
    """The model as ONNX, constants folded by ONNX Runtime as its quantization wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, ready = Path(folder) / "exported.onnx", Path(folder) / "ready.onnx"
        torch.onnx.export(
            model,
            inputs,
            exported,
            input_names=names,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        quant_pre_process(exported, ready, skip_symbolic_shape=True)
        return ready.read_bytes()


class OnnxModule(nn.Module):
    """A session as a module whose inputs are named as in the model."""

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        super().__init__()
        self.session = onnx_session(model, threads)
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        feed = dict(zip(self.names, args, strict=False)) | kwargs
        return torch.from_numpy(self.session.run(None, {name: value.numpy() for name, value in feed.items()})[0])


def onnx_layer(model: bytes, nbytes: float) -> Layer:
    session = onnx_session(model)

    def bind(x: Tensor) -> Callable[[], Any]:
        feed = {"x": x.numpy()}
        return lambda: session.run(None, feed)[0]

    return Layer(bind, nbytes, UNLIMITED)


def onnx_int8(weight: Tensor) -> Layer:
    from onnx import helper

    rows, columns = weight.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx_model(node, {"w": weight.T.numpy()}, [("x", ["m", columns])], [("y", ["m", rows])])
    return onnx_layer(onnx_dynamic(model.SerializeToString()), weight.numel() + 5 * rows)


def onnx_int4(weight: Tensor) -> Layer:
    """MatMulNBits, activations rounded to int8 (accuracy_level 4)."""
    from onnx import helper

    rows, columns = weight.shape
    codes, scale = int4_codes(weight)
    settings = {"K": columns, "N": rows, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **settings)
    weights = {"w": nibbles(codes), "s": scale}
    model = onnx_model(node, weights, [("x", ["m", columns])], [("y", ["m", rows])])
    return onnx_layer(model.SerializeToString(), weight.numel() / 2 + scale.nbytes)


@contextlib.contextmanager
def quiet_logging() -> Any:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
