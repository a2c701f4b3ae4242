"""Linear layers in graphs: exported and compiled, one operator each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from fewbit.ops import linear
from fewbit.qtensor import QTensor, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

ROWS, COLUMNS = 10, 45
WEIGHTS = {
    "int8-rows": QuantSpec("int8", per_channel(0)),
    "int4-groups": QuantSpec("int4", per_group(32), scale_dtype="bfloat16"),
    "int4-groups-asymmetric": QuantSpec("int4", per_group(32), symmetric=False),
    "nf4-groups": QuantSpec("nf4", per_group(16)),
}
INPUTS = {
    "token": QuantSpec("int8", PER_TOKEN),
    "token-asymmetric": QuantSpec("uint8", PER_TOKEN, symmetric=False),
    "tensor": QuantSpec("int8", PER_TENSOR),
    "groups": QuantSpec("int8", per_group(32)),
}


def operands(weight_spec: QuantSpec) -> tuple[Tensor, QTensor, Tensor]:
    """An input, a quantized weight and a bias."""
    torch.manual_seed(0)
    return torch.randn(2, 3, COLUMNS), quantize(torch.randn(ROWS, COLUMNS), weight_spec), torch.randn(ROWS)


class Layer(nn.Module):
    """A linear layer with plain buffers."""

    def __init__(self, weight: QTensor, bias: Tensor, spec: QuantSpec | None) -> None:
        super().__init__()
        self.weight_spec, self.weight_shape, self.spec = weight.spec, weight.shape, spec
        assert isinstance(weight.scale, Tensor)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = QTensor(self.packed, self.scale, self.zero_point, self.weight_spec, self.weight_shape)
        return linear(x, weight, self.bias, self.spec)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, None) for name in ("int8-rows", "int4-groups-asymmetric", "nf4-groups")),
        *((name, "token") for name in ("int8-rows", "int4-groups-asymmetric", "nf4-groups")),
        *((name, "tensor") for name in ("int8-rows", "int4-groups", "nf4-groups")),
        *((name, "token-asymmetric") for name in ("int8-rows", "int4-groups", "nf4-groups")),
    ],
)
def test_an_exported_layer_gives_equal_results(name: str, spec: str | None) -> None:
    x, weight, bias = operands(WEIGHTS[name])
    layer = Layer(weight, bias, None if spec is None else INPUTS[spec])
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(exported.module()(x), layer(x))
    more = torch.cat([x, -x, 2 * x])
    assert torch.equal(exported.module()(more), layer(more))


@pytest.mark.parametrize("granularity", [per_channel(0), per_group(32)], ids=["rows", "groups"])
@pytest.mark.parametrize("spec", [None, INPUTS["token"]], ids=["weight-only", "dynamic"])
def test_layers_with_compiled_kernels_are_one_operator_in_the_graph(
    granularity: Granularity, spec: QuantSpec | None
) -> None:
    x, weight, bias = operands(QuantSpec("int8", granularity))
    graph = torch.export.export(Layer(weight, bias, spec), (x,)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == [f"fewbit.linear_{'weight_only' if spec is None else 'dynamic'}.default"]


@pytest.mark.parametrize("spec", [None, INPUTS["token"]], ids=["weight-only", "dynamic"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch._dynamo does so
@pytest.mark.parametrize("wants_gradients", [True, False], ids=["gradients", "no-gradients"])
def test_compiled_layers_call_one_operator(spec: QuantSpec | None, activation: str, wants_gradients: bool) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, bias, spec, activation=activation)

    backend = aot_autograd(fw_compiler=record, bw_compiler=lambda graph, _: make_boxed_func(graph))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    if not wants_gradients:
        with torch.no_grad():
            assert torch.equal(compiled(x, bias), layer(x, bias))
    else:
        x.requires_grad_()
        bias.requires_grad_()
        y, expected = compiled(x, bias), layer(x, bias)
        assert torch.equal(y, expected)
        slope = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, bias), slope), torch.autograd.grad(expected, (x, bias), slope)
        )
    assert [name for name in called if "fewbit" in name] == [
        f"fewbit.linear_{'weight_only' if spec is None else 'dynamic'}.default"
    ]
