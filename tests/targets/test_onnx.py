"""ONNX files: valid, of integers, for any batch size, and with nothing of the machine that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewbit
from fewbit.batches import Call
from fewbit.lowering import explicit_graph
from fewbit.targets.onnx import OPSET, onnx_model, write_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2), nn.Hardswish()),
        *(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    ).eval()


@pytest.fixture(scope="module")
def proto(network: nn.Module, static: fewbit.Recipe) -> Any:
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)
    call = Call((x,), {})
    return onnx_model(explicit_graph(fewbit.quantize(network, static, [x]), call)[0], call)


def nodes(proto: Any, kind: str) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type == kind]


def initializers(proto: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def test_the_checker_passes(proto: Any) -> None:
    onnx.checker.check_model(proto, full_check=True)
    assert [(part.domain, part.version) for part in proto.opset_import] == [("", OPSET)] == [("", 21)]


def test_the_batch_is_symbolic_and_the_input_has_its_name(proto: Any) -> None:
    [given], [made] = proto.graph.input, proto.graph.output
    assert given.name == "input"
    sizes = [[axis.dim_value for axis in item.type.tensor_type.shape.dim] for item in (given, made)]
    assert sizes == [[0, 3, 8, 8], [0, 5]]
    assert given.type.tensor_type.shape.dim[0].dim_param == made.type.tensor_type.shape.dim[0].dim_param != ""


def test_weights_are_int8_and_biases_int32(proto: Any) -> None:
    tensors = initializers(proto)
    sources = {node.output[0]: node.input for node in nodes(proto, "DequantizeLinear")}
    checked = 0
    for layer in (*nodes(proto, "Conv"), *nodes(proto, "Gemm")):
        assert layer.input[0] in sources
        if layer.input[1] not in sources or sources[layer.input[1]][0] not in tensors:
            continue  # Gemm after a transpose
        for name, kind in zip(layer.input[1:], (onnx.TensorProto.INT8, onnx.TensorProto.INT32), strict=True):
            codes, scale, zeros = (tensors[part] for part in sources[name])
            assert codes.data_type == zeros.data_type == kind
            assert scale.data_type == onnx.TensorProto.FLOAT and list(scale.dims) == list(zeros.dims) == [codes.dims[0]]
            assert not onnx.numpy_helper.to_array(zeros).any()
        checked += 1
    assert checked >= 3
    assert not [t.name for t in tensors.values() if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]


def test_activations_are_uint8(proto: Any) -> None:
    tensors = initializers(proto)
    for node in nodes(proto, "QuantizeLinear"):
        scale, zero_point = (tensors[name] for name in node.input[1:])
        assert zero_point.data_type == onnx.TensorProto.UINT8 and not scale.dims and not zero_point.dims


def test_no_scale_or_zero_point_is_shared(proto: Any) -> None:
    tensors = initializers(proto)
    used = [
        name
        for node in (*nodes(proto, "QuantizeLinear"), *nodes(proto, "DequantizeLinear"))
        for name in node.input[1:]
        if name in tensors
    ]
    assert len(used) == len({*used})


def test_nothing_of_the_machine_is_in_the_file(proto: Any) -> None:
    content = proto.SerializeToString()
    for word in (
        str(Path.cwd()),
        str(Path(fewbit.__file__).parent),
        str(Path.home()),
        "site-packages",
        ".py",
        "stack_trace",
    ):
        assert word.encode() not in content, word


def test_nothing_is_printed(network: nn.Module, static: fewbit.Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 3, 8, 8)
    quantized = fewbit.quantize(network, static, [x])
    capfd.readouterr()
    onnx_model(explicit_graph(quantized, Call((x,), {}))[0], Call((x,), {}))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_it_is_the_same_each_time(network: nn.Module, static: fewbit.Recipe) -> None:
    x = torch.ones(2, 3, 8, 8)
    quantized = fewbit.quantize(network, static, [x])
    call = Call((x,), {})
    first, second = (onnx_model(explicit_graph(quantized, call)[0], call).SerializeToString() for _ in range(2))
    assert first == second


def test_inputs_are_named_as_in_forward(static: fewbit.Recipe) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, vectors: torch.Tensor, *, weights: torch.Tensor) -> torch.Tensor:
            return self.linear(vectors) * weights

    torch.manual_seed(0)
    call = Call((torch.randn(3, 4),), {"weights": torch.rand(3, 1)})
    quantized = fewbit.quantize(Two().eval(), static, [{"vectors": call.args[0], **call.kwargs}])
    made = onnx_model(explicit_graph(quantized, call)[0], call)
    assert [item.name for item in made.graph.input] == ["vectors", "weights"]
    onnx.checker.check_model(made, full_check=True)


def test_write(proto: Any, tmp_path: Path) -> None:
    path = write_onnx(proto, tmp_path / "deep" / "model.onnx")
    assert path == tmp_path / "deep" / "model.onnx"
    assert onnx.load(path).SerializeToString() == proto.SerializeToString()
    assert [*path.parent.iterdir()] == [path]


def test_an_interrupted_write_leaves_the_old_file(proto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def half(proto: Any, path: Path) -> None:
        Path(path).write_bytes(b"ha")
        raise OSError("disk full")

    monkeypatch.setattr(onnx, "save", half)
    with pytest.raises(OSError, match="disk full"):
        write_onnx(proto, path)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_without_the_packages(network: nn.Module, static: fewbit.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    x = torch.randn(2, 3, 8, 8)
    call = Call((x,), {})
    module = explicit_graph(fewbit.quantize(network, static, [x]), call)[0]
    with pytest.raises(
        fewbit.UnsupportedError, match=r"needs onnx and onnxscript: pip install 'fewbit\[onnxruntime\]'"
    ):
        onnx_model(module, call)


def test_what_onnx_has_not(net: Any, static: fewbit.Recipe) -> None:
    torch.manual_seed(0)
    model = net(lambda m, x: m.a(torch.special.i1e(x)), a=nn.Linear(4, 3)).eval()
    x = torch.randn(3, 4)
    call = Call((x,), {})
    module = explicit_graph(fewbit.quantize(model, static, [x]), call)[0]
    with pytest.raises(fewbit.UnsupportedError, match=r"torch.onnx cannot write this model"):
        onnx_model(module, call)
