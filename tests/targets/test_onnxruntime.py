"""ONNX Runtime computes what fewbit's kernels do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbit
from fewbit.targets.target import relative_difference

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def residual(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    y = torch.relu(m.b(x) + x)
    y = torch.cat([y, F.max_pool2d(torch.relu(m.c(y)), 3, 1, 1)], 1)
    return m.f(torch.relu(m.d(y)).mean((2, 3)))


def mobile(m: Any, x: Tensor) -> Tensor:
    y = F.relu6(m.b(F.relu6(m.a(x))))
    y = F.hardswish(m.c(y))
    return m.f(F.avg_pool2d(torch.relu(m.d(y)), 2).flatten(1))


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


MODELS = {
    "residual": (residual, {"a": (3, 8), "b": (8, 8), "c": (8, 6), "d": (14, 10, 1)}, 10),
    "mobile": (mobile, {"a": (3, 8), "b": (8, 8), "c": (8, 6, 1), "d": (6, 10)}, 160),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, net: Any, static: fewbit.Recipe) -> tuple[nn.Module, list[Tensor]]:
    """A quantized network and data."""
    torch.manual_seed(0)
    function, convolutions, features = MODELS[request.param]
    layers: dict[str, nn.Module] = {name: conv(*sizes) for name, sizes in convolutions.items()}
    if request.param == "mobile":
        layers["b"] = conv(8, 8, groups=8)
    model = net(function, **layers, f=nn.Linear(features, 5)).eval()
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    return fewbit.quantize(model, static, data), data


def test_equal_to_fewbits_kernels_for_any_batch(case: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = case
    lowered, reference = (fewbit.lower(model, data[0], target) for target in ("onnxruntime", "torch"))
    assert lowered.any_batch and lowered.difference < 0.005
    rows = torch.cat(data)
    with torch.no_grad():
        for size in (1, 3, 12):
            found, expected = lowered(rows[:size]), reference(rows[:size])
            assert found.dtype == torch.float32 and found.shape == expected.shape
            assert relative_difference(found, expected) < 0.005


def test_what_runs_in_int8(case: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = case
    lowered = fewbit.lower(model, data[0], "onnxruntime")
    kinds = [operator.kind for operator in lowered.operators if operator.is_int8]
    assert kinds.count("QLinearConv") == 4 and "QGemm" in kinds
    assert not [operator for operator in lowered.operators if operator.kind in ("Conv", "FusedConv", "Gemm", "MatMul")]
    assert lowered.summary().startswith(f"onnxruntime: {len(kinds)} of {len(lowered.operators)} operators in int8")


def test_outputs_are_the_callers_and_other_shapes_are_refused(case: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = case
    lowered = fewbit.lower(model, data[0], "onnxruntime")
    first = lowered(data[0])
    copied = first.clone()
    lowered(data[1])
    assert torch.equal(first, copied)
    assert torch.equal(lowered(data[0].to(memory_format=torch.channels_last)), copied)
    with pytest.raises(fewbit.CalibrationError, match=r"lowered for inputs \[any, 3, 8, 8\]"):
        lowered(data[0][..., 1:])


def test_a_real_model(fashion: fewbit.Task) -> None:
    model = fewbit.quantize(fashion.model, "int8-static", fashion.calibration[0].split(50)[:1])
    x = fashion.calibration[1][:20]
    lowered, reference = (fewbit.lower(model, x[:2], target) for target in ("onnxruntime", "torch"))
    with torch.no_grad():
        assert relative_difference(lowered(x), reference(x)) < 0.01
    assert sum(o.is_int8 for o in lowered.operators) >= 0.8 * len(lowered.operators)


@pytest.mark.parametrize("channels, groups", [(1, 1), (2, 1), (3, 1), (5, 1), (8, 8), (8, 4)])
def test_sums_of_the_greatest_weights_and_activations_do_not_saturate(channels: int, groups: int) -> None:
    convolution = nn.Conv2d(channels, 16, 3, groups=groups, bias=False)
    nn.init.constant_(convolution.weight, 0.1)
    data = [torch.ones(2, channels, 6, 6)]
    model = fewbit.quantize(nn.Sequential(convolution, nn.ReLU()).eval(), "int8-static", data)
    assert fewbit.lower(model, data[0], "onnxruntime").difference < 1e-6


def test_constants_and_several_inputs(static: fewbit.Recipe) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            y = self.a(x) if mask is None else self.a(x * mask)
            return y * scale, {"y": y}

    torch.manual_seed(0)
    data = [{"x": torch.randn(4, 6), "mask": None, "scale": torch.rand(4, 1)} for _ in range(2)]
    model = fewbit.quantize(Two().eval(), static, data)
    lowered = fewbit.lower(model, data[0], "onnxruntime")
    with torch.no_grad():
        found, expected = lowered(**data[1]), fewbit.lower(model, data[0])(**data[1])
    assert isinstance(found, tuple) and [*found[1]] == ["y"] and relative_difference(found, expected) < 1e-5


def test_integer_inputs(static: fewbit.Recipe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    tokens = torch.randint(0, 50, (4, 7))
    quantized = fewbit.quantize(model, static, [tokens])
    lowered = fewbit.lower(quantized, tokens, "onnxruntime")
    with torch.no_grad():
        assert relative_difference(lowered(tokens[:2]), fewbit.lower(quantized, tokens)(tokens[:2])) < 0.005
