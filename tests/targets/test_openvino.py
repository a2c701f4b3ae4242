"""OpenVINO computes nearly what fewbit's kernels do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbit
from fewbit.targets.target import relative_difference

for package in ("onnx", "onnxscript", "openvino"):
    pytest.importorskip(package)


def network(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    y = torch.relu(m.b(x) + x)
    y = torch.cat([y, F.max_pool2d(torch.relu(m.c(y)), 3, 1, 1)], 1)
    return m.f(F.relu6(m.e(torch.relu(m.d(y)))).mean((2, 3)))


@pytest.fixture(scope="module")
def case(net: Any, static: fewbit.Recipe) -> tuple[nn.Module, list[Tensor]]:
    """A quantized network and data."""
    torch.manual_seed(0)
    convolutions = {"a": (3, 8), "b": (8, 8), "c": (8, 6), "d": (14, 16)}
    layers = {name: nn.Conv2d(*sizes, 3, padding=1) for name, sizes in convolutions.items()}
    model = net(network, **layers, e=nn.Conv2d(16, 16, 3, groups=16), f=nn.Linear(16, 5)).eval()
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    return fewbit.quantize(model, static, data), data


@pytest.fixture(scope="module")
def lowered(case: tuple[nn.Module, list[Tensor]]) -> fewbit.Lowered:
    return fewbit.lower(case[0], case[1][0], "openvino")


def test_close_to_fewbits_kernels_for_any_batch(case: tuple[nn.Module, list[Tensor]], lowered: fewbit.Lowered) -> None:
    model, data = case
    reference = fewbit.lower(model, data[0])
    assert lowered.any_batch and lowered.difference < 0.02
    rows = torch.cat(data)
    with torch.no_grad():
        for size in (1, 3, 12, 3):
            found, expected = lowered(rows[:size]), reference(rows[:size])
            assert found.dtype == torch.float32 and found.shape == expected.shape
            assert relative_difference(found, expected) < 0.02


def test_what_runs_in_int8(lowered: fewbit.Lowered) -> None:
    convolutions = [operator for operator in lowered.operators if operator.kind == "Convolution"]
    assert len(convolutions) == 5 and all(operator.is_int8 for operator in convolutions)
    assert lowered.summary().startswith("openvino: ")


def test_outputs_are_the_callers_and_other_shapes_are_refused(
    case: tuple[nn.Module, list[Tensor]], lowered: fewbit.Lowered
) -> None:
    _, data = case
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
    lowered, reference = (fewbit.lower(model, x[:2], target) for target in ("openvino", "torch"))
    with torch.no_grad():
        assert relative_difference(lowered(x), reference(x)) < 0.03


def test_what_openvino_has_not_is_an_error_of_fewbit(static: fewbit.Recipe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(fewbit.UnsupportedError, match="openvino cannot run this model: "):
        fewbit.lower(fewbit.quantize(model, static, [x]), x, "openvino")
