"""What the compiled operators make of unusual operands and surroundings, and what they say of wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fewbit.ops import native
from fewbit.qtensor import quantize
from fewbit.spec import QuantSpec, per_group

pytestmark = pytest.mark.skipif(not native.LOADED, reason="fewbit was installed without kernels")

BITS = pytest.mark.parametrize("bits", [8, 4])
OPERATORS = pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
SILU = 4


def operands(bits: int, rows: int = 3, columns: int = 40) -> tuple[Tensor, Tensor]:
    """Packed codes, and scales by row."""
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    packed = codes if bits == 8 else torch.randint(-(2**31), 2**31, (rows, -(-columns // 8))).to(torch.int32)
    return packed, torch.rand(rows, 1)


def call(name: str, x: Tensor, packed: Tensor, scale: Tensor, bits: int, columns: int = 40, **more: int) -> Tensor:
    groups = (0, 0) if name == "linear_dynamic" else (0,)
    result: Tensor = getattr(torch.ops.fewbit, name)(x, packed, scale, None, None, columns, bits, *groups, **more)
    return result


@pytest.mark.parametrize("rows", [3, 20])
def test_silu_is_torchs_for_any_magnitude(rows: int) -> None:
    values = [0.0, -1.0, 1.0, -87.0, -88.3, -88.5, -90.0, -1e4, -1e10, -1e35, -torch.finfo().max, 1e4, 1e35, torch.nan]
    values += [torch.inf, -torch.inf]
    one, scale = torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1)
    for value in values:
        x = torch.full((rows, 1), value)
        y = call("linear_weight_only", x, one, scale, 8, 1, activation=SILU)
        torch.testing.assert_close(y, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-6, equal_nan=True)


@BITS
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_only_of_16_bits_is_that_of_float32_rounded(dtype: torch.dtype, rows: int, bits: int) -> None:
    x = torch.randn(rows, 40).to(dtype)
    x[0, :4] = torch.tensor([0.0, 6e-8, -3e-5, 1e-4])  # subnormal ones among them
    packed, scale = operands(bits)
    y = call("linear_weight_only", x, packed, scale, bits)
    assert torch.equal(y, call("linear_weight_only", x.float(), packed, scale, bits).to(dtype))


@BITS
def test_weight_only_under_autocast(bits: int) -> None:
    x, (packed, scale) = torch.randn(40, 40), operands(bits)
    expected = call("linear_weight_only", x, packed, scale, bits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call("linear_weight_only", x, packed, scale, bits), expected)


@OPERATORS
@pytest.mark.parametrize("columns", [96, 256, 608])
def test_a_scale_that_is_not_finite_stays_in_its_row(name: str, columns: int) -> None:
    weight = quantize(torch.randn(9, columns), QuantSpec("int4", per_group(32), scale_dtype="bfloat16"))
    assert isinstance(weight.scale, Tensor)
    weight.scale[1, 0] = torch.nan
    groups = (32,) if name == "linear_weight_only" else (32, 32)
    for rows in (1, 3, 6):
        x = torch.randn(rows, columns)
        y = getattr(torch.ops.fewbit, name)(x, weight.packed, weight.scale, None, None, columns, 4, *groups)
        assert y.isnan().any(0).tolist() == [channel == 1 for channel in range(9)]


@OPERATORS
def test_messages_name_what_was_found(name: str) -> None:
    x, (packed, scale) = torch.randn(2, 40), operands(4)
    with pytest.raises(RuntimeError, match=r"packed must be contiguous int32 \[rows, 5\], found int8 \[3, 40\]\."):
        call(name, x, operands(8)[0], scale, 4)
    with pytest.raises(RuntimeError, match=r"packed must be .*, found int32 \[3, 5\], not contiguous\."):
        call(name, x, packed.t().contiguous().t(), scale, 4)
    with pytest.raises(
        RuntimeError, match=r"scale must be contiguous float32 or bfloat16 \[3, 1\], found float16 \[3, 1\]\."
    ):
        call(name, x, packed, scale.half(), 4)
    with pytest.raises(RuntimeError, match=r"x must be float32, bfloat16 or float16, found float64 \[2, 40\]\."):
        call(name, x.double(), packed, scale, 4)
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 40\], found float32 \[2, 39\]\."):
        call(name, x[:, :39].contiguous(), packed, scale, 4)


@OPERATORS
@BITS
def test_a_weight_without_columns_is_refused(name: str, bits: int) -> None:
    packed, scale = operands(bits, columns=0)
    with pytest.raises(RuntimeError, match=r"a weight must have at least one column, found 0\."):
        call(name, torch.randn(20, 0), packed, scale, bits, 0)


UNKNOWN_ISA = """
import torch, fewbit
torch.set_num_threads(2)
packed, scale = torch.zeros(512, 768, dtype=torch.int8), torch.ones(512, 1)
torch.ops.fewbit.embedding(torch.arange(512), packed, scale, None, 768, 8, 0)
"""


def test_an_unknown_instruction_set_is_named_by_whatever_comes_first() -> None:
    environment = os.environ | {"FEWBIT_ISA": "avx9"}
    result = subprocess.run(
        [sys.executable, "-c", UNKNOWN_ISA], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert result.returncode == 1 and "FEWBIT_ISA: found 'avx9'" in result.stderr
