"""The built-in target: fewbit's integer kernels, listed as what they are."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fewbit
from fewbit.targets.target import relative_difference

# Built in this process and in others.
BUILD = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(24, 40, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 11),
    ).eval()
"""
space: dict[str, object] = {}
exec(BUILD, space)


def network() -> nn.Module:
    torch.manual_seed(0)
    return space["build"]()  # type: ignore[operator,no-any-return]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def quantized(static: fewbit.Recipe, images: Tensor) -> nn.Module:
    return fewbit.quantize(network(), static, [images])


def test_operators(quantized: nn.Module, images: Tensor) -> None:
    lowered = fewbit.lower(quantized, images)
    assert lowered.target == "torch" and lowered.any_batch and lowered.difference == 0
    in_int8 = [operator.kind for operator in lowered.operators if operator.is_int8]
    for kind, count in (("conv_uint8", 3), ("linear_uint8", 1), ("lookup_uint8", 1), ("average_uint8", 1)):
        assert in_int8.count(kind) == count, in_int8
    assert not [o.kind for o in lowered.operators if o.kind in ("conv2d", "linear", "relu", "hardswish")]


def test_close_to_the_quantized_model_for_any_batch(quantized: nn.Module, images: Tensor) -> None:
    lowered = fewbit.lower(quantized, images[:2])
    with torch.no_grad():
        for size in (1, 2, 5, 6):
            found = lowered(images[:size])
            assert relative_difference(found, quantized(images[:size])) < 0.02
            assert torch.equal(found, torch.cat([lowered(row[None]) for row in images[:size]]))


def test_layouts_of_inputs_do_not_matter(quantized: nn.Module, images: Tensor) -> None:
    lowered = fewbit.lower(quantized, images)
    with torch.no_grad():
        expected = lowered(images)
        wide = torch.randn(6, 3, 10, 20)
        wide[..., ::2] = images
        for x in (
            images.to(memory_format=torch.channels_last),
            images.transpose(2, 3).contiguous().transpose(2, 3),
            wide[..., ::2],
        ):
            assert torch.equal(lowered(x), expected)


def test_results_are_the_callers(quantized: nn.Module, images: Tensor) -> None:
    lowered = fewbit.lower(quantized, images)
    kept = images.clone()
    with torch.no_grad():
        first = lowered(images)
        copied = first.clone()
        lowered(images * 2)
        assert torch.equal(first, copied)
        first.zero_()
        assert torch.equal(lowered(images), copied)
    assert torch.equal(images, kept)


def test_two_lowered_models_do_not_share_what_they_are(
    quantized: nn.Module, images: Tensor, static: fewbit.Recipe
) -> None:
    first = fewbit.lower(quantized, images)
    with torch.no_grad():
        expected = first(images)
        other = network()
        for parameter in other.parameters():
            parameter.mul_(2)
        second = fewbit.lower(fewbit.quantize(other, static, [images]), images)
        assert not torch.equal(second(images), expected) and torch.equal(first(images), expected)


def test_an_empty_batch(quantized: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        assert fewbit.lower(quantized, images)(images[:0]).shape == (0, 11)


def test_what_the_model_becomes_later_does_not_matter(quantized: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(quantized)
    lowered = fewbit.lower(model, images)
    with torch.no_grad():
        expected = lowered(images)
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert torch.equal(lowered(images), expected)


@pytest.mark.parametrize("isa", ["default", "scalar"])
def test_a_loaded_model_gives_the_same_bits_elsewhere(
    isa: str, quantized: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        save_file({"x": images, "y": fewbit.lower(quantized, images)(images)}, tmp_path / "data.safetensors")
    fewbit.save(quantized, tmp_path / "out")
    script = f"""{BUILD}
import sys
from safetensors.torch import load_file
import fewbit
data = load_file(sys.argv[1] + "/data.safetensors")
lowered = fewbit.lower(fewbit.load(sys.argv[1] + "/out", build()), data["x"][:3])
with torch.no_grad():
    assert torch.equal(lowered(data["x"]), data["y"]), (lowered(data["x"]) - data["y"]).abs().max()
"""
    environment = {**os.environ, **({"FEWBIT_ISA": "scalar"} if isa == "scalar" else {})}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120, env=environment)
