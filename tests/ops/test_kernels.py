"""Compiled kernels against the plain-torch reference, on random problems; each instruction set in a process of its own.

tests/csrc has the same without torch, with ten thousand problems and sanitizers.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fewbit.ops import native
from fewbit.ops.linear import call, integer_products, numbers_of
from fewbit.qtensor import QTensor, dequantize, quantize
from fewbit.spec import PER_TOKEN, QuantSpec, per_channel, per_group

INSTRUCTION_SETS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon_dotprod", "neon_i8mm")
PROBLEMS = 150


def problem(seed: int) -> tuple[Tensor, QTensor, Tensor | None, QuantSpec, str]:
    """Activations, a weight, a bias, how activations are quantized, and all that in words."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    rows, channels = pick.choice([1, 2, 3, 4, 5, 7, 9, 13, 33]), pick.choice([1, 3, 8, 16, 17, 31, 64, 100])
    columns = pick.choice([1, 7, 31, 32, 33, 64, 96, 129, 160, 256, 511, 1100])
    bits, group = pick.choice([4, 8]), pick.choice([0, 32, 64, 96, 128, 1024])
    input_group = pick.choice([0, group]) if group else pick.choice([0, 32, 64])
    symmetric, dtype = pick.random() < 0.6, pick.choice(["float32", "bfloat16"])
    granularity = per_group(group) if group else per_channel(0)
    weight = torch.randn(channels, columns) * pick.choice([1.0, 1e-3, 10.0]) + (0 if symmetric else pick.random())
    if pick.random() < 0.3:
        weight = weight.sign()  # the largest codes
    x = torch.randn(columns, rows).T * 10 ** pick.uniform(-2, 2)  # not contiguous
    if pick.random() < 0.3:
        x = x.sign()
    bias = torch.randn(channels) if pick.random() < 0.5 else None
    spec = QuantSpec("int8", per_group(input_group) if input_group else PER_TOKEN)
    words = f"{rows} x {channels} x {columns}, {bits} bits, groups {group} and {input_group}, {symmetric=}"
    quantized = quantize(weight, QuantSpec(f"int{bits}", granularity, symmetric, scale_dtype=dtype))
    return x, quantized, bias, spec, words


def check(seed: int) -> None:
    x, weight, bias, spec, words = problem(seed)
    assert isinstance(weight.scale, Tensor)
    stored = (weight.packed, weight.scale, weight.zero_point, bias)
    numbers = numbers_of(weight, spec)
    assert numbers is not None
    found, expected = call(x, *stored, numbers), integer_products(x, weight, bias, spec)
    if numbers.weight_group or numbers.input_group:  # exact sums of groups, added up in another order
        assert float((found - expected).abs().max()) <= 4e-6 * float(expected.abs().max()), words
    else:
        assert torch.equal(found, expected), words
    numbers = numbers_of(weight, None)
    assert numbers is not None
    found, expected = call(x, *stored, numbers), torch.nn.functional.linear(x, dequantize(weight), bias)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), words


@pytest.mark.skipif(not native.LOADED, reason="no compiled kernels")
def test_here() -> None:
    for seed in range(PROBLEMS):
        check(seed)


@pytest.mark.skipif(not native.LOADED, reason="no compiled kernels")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_set(name: str) -> None:
    environment = {**os.environ, "FEWBIT_ISA": name, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    if "this CPU and build allow" in result.stderr:
        pytest.skip(f"this CPU has no {name}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == name


if __name__ == "__main__":
    isa = native.isa()
    for number in range(PROBLEMS, 2 * PROBLEMS):
        check(number)
    print(isa)
