"""ONNX files with QuantizeLinear and DequantizeLinear, as ONNX Runtime and OpenVINO fuse them to integer operators.

Activations are uint8 a tensor, weights int8 a channel, biases int32 of the scale that the sums have: opset 21. An operator
becomes an integer one where it stands between a DequantizeLinear on each input and a QuantizeLinear on its result.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fewbit.batches import Call
from fewbit.errors import UnsupportedError
from fewbit.graph.explicit import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from fewbit.graph.export import export

OPSET = 21


def onnx_model(module: GraphModule, call: Call) -> Any:
    """The ``onnx.ModelProto`` of a graph in explicit form. Inputs are named as the arguments of the model's forward.

    UnsupportedError without the packages onnx and onnxscript, or if the graph has an operator that ONNX has not.
    """
    try:
        import onnx
        import onnxscript
    except ImportError:
        raise UnsupportedError("an ONNX file needs onnx and onnxscript: pip install 'fewbit[onnxruntime]'.") from None
    program = export(module, call.args, call.kwargs)
    if isinstance(program, str):
        raise UnsupportedError(f"the lowered model cannot be exported: {program}")
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=_translations(onnxscript),
            )
    except (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedError(f"torch.onnx cannot write this model: {first[:300]}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    assert made is not None
    proto = made.model_proto
    _finish(proto)
    return proto


def write_onnx(proto: Any, path: str | Path) -> Path:
    """Write the model to ``path``, whole or not at all."""
    import onnx

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.next")
    try:
        onnx.save(proto, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _translations(onnxscript: Any) -> dict[Any, Any]:
    op = onnxscript.opset21

    def constant(value: Any, kind: Any) -> Any:
        from onnx import helper

        return op.Constant(value=helper.make_tensor("", kind, [], [value]))

    def quantize(x: Any, scale: float, zero_point: int) -> Any:
        from onnx import TensorProto

        return op.QuantizeLinear(x, constant(scale, TensorProto.FLOAT), constant(zero_point, TensorProto.UINT8))

    def dequantize(codes: Any, scale: float, zero_point: int) -> Any:
        from onnx import TensorProto

        return op.DequantizeLinear(codes, constant(scale, TensorProto.FLOAT), constant(zero_point, TensorProto.UINT8))

    def dequantize_channels(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    return {QUANTIZE: quantize, DEQUANTIZE: dequantize, DEQUANTIZE_CHANNELS: dequantize_channels}


def _finish(proto: Any) -> None:
    """Zero points for weights and biases, without which ONNX Runtime leaves Gemm in float; scales and zero points of its
    own for every operator, since ONNX Runtime's optimizations replace those they rewrite; no traces of the source code."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    seen: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        del node.metadata_props[:]
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if len(node.input) == 2 and node.input[0] in initializers:
            codes, scale = (numpy_helper.to_array(initializers[name]) for name in node.input)
            zeros = numpy_helper.from_array((scale * 0).astype(codes.dtype), f"{node.input[0]}_zero_point")
            proto.graph.initializer.append(zeros)
            node.input.append(zeros.name)
        for place in range(1, len(node.input)):
            name = node.input[place]
            if name in initializers and name in seen:
                own = proto.graph.initializer.add()
                own.CopyFrom(initializers[name])
                own.name = node.input[place] = f"{name}_{number}"
            seen.add(name)
    for item in (
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.value_info,
        *proto.graph.initializer,
        proto.graph,
    ):
        del item.metadata_props[:]
    del proto.metadata_props[:]
