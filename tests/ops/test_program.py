"""run_program: each kind of step is its operator to the bit, memory is shared safely, wrong programs are refused."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import max_pool2d

from fewbit.ops import codes, native
from fewbit.ops.program import Kind, Step, Word, assemble

pytestmark = pytest.mark.skipif(not native.LOADED, reason="no compiled kernels")
operators = torch.ops.fewbit
INSTRUCTION_SETS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon_dotprod", "neon_i8mm")


def random_codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def same(found: Tensor, expected: Tensor, words: object) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.is_contiguous(), words
    assert torch.equal(found, expected), words


def step(kind: Kind, *words: Word, reads: tuple[int, ...] = (), size: int = 100) -> Step:
    return Step(kind, words, reads, size)


CODES = step(Kind.CODES, 0)
NO_OTHER = (-1, 0.0, 0)


def alone(x: Tensor, kind: Kind, *words: Word) -> Tensor:
    """One step on codes, whose result is the program's."""
    program = assemble([CODES, step(kind, 0, *words, reads=(0,))], 1, [1])
    return run(program, x)[0]


def run(program: Tensor, *inputs: Tensor) -> list[Tensor]:
    results: list[Tensor] = operators.run_program(list(inputs), program)
    return results


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_each_kind_is_its_operator(batch: int) -> None:
    torch.manual_seed(0)
    x = random_codes(batch, 7, 6, 12)
    for shape, groups, zero_point in (([40, 12, 3, 3], 1, 90), ([12, 1, 3, 3], 12, 90), ([9, 4, 2, 3], 3, None)):
        weight = torch.randint(-128, 128, shape, dtype=torch.int8)
        packed, multiplier = operators.pack_uint8(weight, groups), torch.rand(shape[0]) * 1e-2
        offset = torch.randint(-999, 999, (shape[0],)).int()
        constants = (*shape, groups, packed, multiplier, offset, 1)
        bounds = (3.0, 250.0, -1 if zero_point is None else zero_point)
        numbers = (2, 1, 1, 2, 1, 2, 17)
        found = alone(x, Kind.CONV, *constants, *bounds, *NO_OTHER, *numbers)
        arguments = (x, packed, shape, multiplier, offset, [2, 1], [1, 2], [1, 2], groups, 17, 3.0, 250.0, zero_point)
        same(found, operators.conv_uint8(*arguments), shape)
        if zero_point is not None:
            other = random_codes(*found.shape)
            conv = step(Kind.CONV, 0, *constants, *bounds, 1, 0.6, 5, *numbers, reads=(0, 1))
            found = run(assemble([CODES, step(Kind.CODES, 1), conv], 2, [2]), x, other)[0]
            same(found, operators.conv_uint8(*arguments, other, 0.6, 5), shape)
    weight = torch.randint(-128, 128, (5, 12, 1, 1), dtype=torch.int8)
    packed, multiplier, offset = operators.pack_uint8(weight, 1), torch.rand(5), torch.zeros(5, dtype=torch.int32)
    found = alone(x, Kind.LINEAR, 5, 12, 1, 1, 1, packed, multiplier, offset, 0, 0.0, 255.0, 8, *NO_OTHER)
    same(found, operators.linear_uint8(x, packed, [5, 12, 1, 1], multiplier, offset, 0.0, 255.0, 8), "linear")
    found = alone(x, Kind.AVERAGE, 3, 2, 2, 1, 1, 0, 0, 1.3, 5, 9)
    same(found, operators.average_uint8(x, [3, 2], [2, 1], [1, 0], False, 1.3, 5, 9), "average")
    table = random_codes(256)
    same(alone(x, Kind.LOOKUP, table), operators.lookup_uint8(x, table), "lookup")
    same(alone(x, Kind.DEQUANTIZE, 0.3, 7), operators.dequantize_uint8(x, 0.3, 7), "dequantize")
    same(alone(x, Kind.RESHAPE, 4, 7, 6, 12, 2, 504), x.reshape(batch, 504), "reshape")
    y = random_codes(batch, 7, 6, 5)
    two = [
        CODES,
        step(Kind.CODES, 1),
        step(Kind.CAT, 3, 3, 0, 1, 0, reads=(0, 1)),
        step(Kind.CAT, 1, 2, 0, 0, reads=(0,)),
    ]
    found, other = run(assemble(two, 2, [2, 3]), x, y)
    same(found, torch.cat([x, y, x], 3), "cat")
    same(other, torch.cat([x, x], 1), "cat")
    added = [CODES, step(Kind.CODES, 1), step(Kind.ADD, 0, 1, 0.7, 3, 1.1, 250, 5.0, 250.0, 100, reads=(0, 1))]
    z = random_codes(*x.shape)
    same(run(assemble(added, 2, [2]), x, z)[0], operators.add_uint8(x, z, 0.7, 3, 1.1, 250, 5.0, 250.0, 100), "add")


@pytest.mark.parametrize("channels", [1, 3, 5, 67])
def test_quantize_of_any_strides(channels: int) -> None:
    x = torch.randn(2, channels, 9, 14)
    as_is, to_last = (assemble([step(Kind.QUANTIZE, 0, kind, 0.02, 120)], 1, [0]) for kind in (0, 1))
    views = (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x[:1], x.transpose(2, 3), x[:0], x[:, :, :1, :1])
    for view in views:
        same(run(as_is, view)[0], operators.quantize_uint8(view, 0.02, 120), view.stride())
        same(run(to_last, view)[0], operators.quantize_uint8(view.permute(0, 2, 3, 1), 0.02, 120), view.stride())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data(), st.booleans())
def test_max_pool_is_torchs(data: st.DataObject, ceil_mode: bool) -> None:
    torch.manual_seed(0)
    two = st.lists(st.integers(1, 3), min_size=2, max_size=2)
    kernel, stride, dilation = (data.draw(two) for _ in range(3))
    window = [(kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    padding = [data.draw(st.integers(0, kernel[i] // 2)) for i in (0, 1)]
    size = [max(1, window[i] - 2 * padding[i]) + data.draw(st.integers(0, 7)) for i in (0, 1)]
    x = random_codes(data.draw(st.integers(1, 2)), *size, data.draw(st.integers(1, 70)))
    found = alone(x, Kind.MAX_POOL, *kernel, *stride, *padding, *dilation, int(ceil_mode))
    expected = max_pool2d(x.permute(0, 3, 1, 2).int(), kernel, stride, padding, dilation, ceil_mode).clamp(min=0)
    same(found, expected.permute(0, 2, 3, 1).contiguous().to(torch.uint8), [kernel, stride, padding, dilation, size])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_slots_are_free_only_after_their_last_reader(data: st.DataObject) -> None:
    """Random programs of sums, layers that add other codes, concatenations and reshapes, whose results may be read by any
    later step."""
    torch.manual_seed(0)
    x, y = random_codes(3, 4, 6), random_codes(3, 4, 6)
    steps = [CODES, step(Kind.CODES, 1)]
    values = [x, y]
    for _ in range(data.draw(st.integers(1, 25))):
        a, b = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
        kind = data.draw(st.sampled_from([Kind.ADD, Kind.LINEAR, Kind.CAT, Kind.RESHAPE]))
        if kind == Kind.RESHAPE:
            width = values[a].numel() // 3
            steps.append(step(kind, a, 3, *values[a].shape[1:], 3, 1, width, reads=(a,), size=values[a].numel()))
            values.append(values[a].reshape(3, 1, width))
        elif kind == Kind.ADD and values[a].shape == values[b].shape:
            numbers = (0.6, 3, 0.7, 200, 0.0, 255.0, 100)
            steps.append(step(kind, a, b, *numbers, reads=(a, b), size=values[a].numel()))
            values.append(codes._add(values[a], values[b], *numbers))  # type: ignore[arg-type]
        elif kind == Kind.LINEAR and values[a].shape == values[b].shape and values[a].shape[-1] < 200:
            size = values[a].shape[-1]
            weight = torch.randint(-128, 128, (size, size, 1, 1), dtype=torch.int8)
            packed, multiplier, offset = (
                operators.pack_uint8(weight, 1),
                torch.rand(size) * 1e-2,
                torch.zeros(size).int(),
            )
            rest = (0.0, 255.0, 100)
            words = (a, size, size, 1, 1, 1, packed, multiplier, offset, 1, *rest, b, 0.7, 90)
            steps.append(step(kind, *words, reads=(a, b), size=values[a].numel()))
            arguments = (values[a], packed, list(weight.shape), multiplier, offset, *rest, values[b], 0.7, 90)
            values.append(operators.linear_uint8(*arguments))
        elif values[a].numel() < 5000:
            steps.append(step(Kind.CAT, 2, 2, a, a, reads=(a,), size=2 * values[a].numel()))
            values.append(torch.cat([values[a], values[a]], 2))
    results = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4))
    found = run(assemble(steps, 2, results), x, y)
    for value, result in zip(found, results, strict=True):
        same(value, values[result], results)
    assert len({value.data_ptr() for value in found} | {x.data_ptr(), y.data_ptr()}) == len(results) + 2


def test_larger_memory_is_given_back_and_taken_again() -> None:
    numbers = (1.0, 0, 1.0, 0, 0.0, 255.0, 0)
    steps = [
        step(Kind.QUANTIZE, 0, 0, 1.0, 0),
        step(Kind.ADD, 0, 0, *numbers, reads=(0,)),
        step(Kind.DEQUANTIZE, 1, 1.0, 0, reads=(1,)),
    ]
    program = assemble(steps, 1, [2])
    for rows in (10, 1 << 25, 3, 1 << 25):
        assert bool((run(program, torch.ones(rows))[0] == 2).all())


PROGRAM = [
    step(Kind.QUANTIZE, 0, 1, 0.02, 120),
    step(Kind.MAX_POOL, 0, 2, 2, 2, 2, 0, 0, 1, 1, 0, reads=(0,)),
    step(Kind.CAT, 3, 2, 0, 0, reads=(0,)),
    step(Kind.LOOKUP, 1, torch.arange(256).to(torch.uint8), reads=(1,)),
    step(Kind.RESHAPE, 3, 4, 2, 3, 3, 2, 18, reads=(3,)),
]


def program() -> Tensor:
    return assemble(PROGRAM, 1, [4, 2])


def changed(word: int, value: int) -> Tensor:
    blob = program()
    blob[8 * word : 8 * word + 8] = torch.tensor(list(struct.pack("=q", value)), dtype=torch.uint8)
    return blob


IMAGE = torch.zeros(2, 3, 4, 6)
REFUSED: list[tuple[Any, list[Tensor], str]] = [
    (program(), [], "has 1 inputs, found 0"),
    (program(), [IMAGE, IMAGE], "has 1 inputs, found 2"),
    (program(), [IMAGE.double()], r"input 0 of the program must be float32, found float64 \[2, 3, 4, 6\]"),
    (program(), [IMAGE[0]], r"must be \[batch, channels, height, width\]"),
    (program(), [IMAGE[:, :, :, :4]], r"made for a value \[1, 2, 3, 3\]|made for values of a multiple"),
    (program(), [IMAGE[:, :, :1]], "larger than the image"),
    (program()[:-1], [IMAGE], "the program is not one that"),
    (program()[:9], [IMAGE], "the program is not one that"),
    (program()[1:], [IMAGE], "the program is not one that"),
    (program().float(), [IMAGE], "the program is not one that"),
    (changed(0, 5), [IMAGE], "the program is not one that"),
    (changed(2, 1 << 60), [IMAGE], "the program is not one that"),
    (changed(3, 7), [IMAGE], "ends within a step|unknown kind"),
    (changed(8, 99), [IMAGE], "unknown kind 99"),
    (changed(9, 77), [IMAGE], "no slot 77"),
    (changed(10, 4), [IMAGE], "no input 4"),
    (changed(10, -1), [IMAGE], "no input -1"),
    (changed(13, 256), [IMAGE], "zero_point must be 0 to 255"),
    (changed(16, 1), [IMAGE], "step 1 of the program cannot read value 1"),
    (changed(16, -1), [IMAGE], "cannot read value -1"),
    (changed(17, 0), [IMAGE], "kernel must be two numbers of at least 1"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_refused(number: int) -> None:
    blob, inputs, message = REFUSED[number]
    with pytest.raises(RuntimeError, match=message):
        run(blob, *inputs)


def test_a_program_of_another_machine_is_refused() -> None:
    packed = operators.pack_uint8(torch.ones(5, 12, 1, 1, dtype=torch.int8), 1)
    packed[4] = 99  # lanes
    with pytest.raises(RuntimeError, match="packed must be what pack_uint8 returns here"):
        alone(
            random_codes(1, 12),
            Kind.LINEAR,
            5,
            12,
            1,
            1,
            1,
            packed,
            torch.ones(5),
            torch.zeros(5).int(),
            0,
            0.0,
            255.0,
            8,
            *NO_OTHER,
        )


def test_other_codes_of_another_shape_are_refused() -> None:
    weight = operators.pack_uint8(torch.ones(5, 12, 1, 1, dtype=torch.int8), 1)
    words = (0, 5, 12, 1, 1, 1, weight, torch.ones(5), torch.zeros(5).int(), 0, 0.0, 255.0)
    for zero_point, other, message in (
        (8, 0, r"other must be of the result's shape \[1, 5\], found \[1, 12\]"),
        (8, 1, "step 1 of the program cannot read value 1"),
        (8, -2, "cannot read value -2"),
        (-1, 0, "zero_point is missing"),
    ):
        linear = step(Kind.LINEAR, *words, zero_point, other, 1.0, 0, reads=(0,))
        with pytest.raises(RuntimeError, match=message):
            run(assemble([CODES, linear], 1, [1]), random_codes(1, 12))


def test_any_change_is_refused_or_does_no_harm() -> None:
    """For AddressSanitizer, mostly."""
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (8, 6, 3, 3), dtype=torch.int8)
    constants = (operators.pack_uint8(weight, 1), torch.rand(8), torch.zeros(8, dtype=torch.int32))
    conv = (2, 8, 6, 3, 3, 1, *constants, 1, 0.0, 255.0, 3)
    geometry = (1, 1, 1, 1, 1, 1, 0)
    steps = [*PROGRAM, step(Kind.CONV, *conv, *NO_OTHER, *geometry, reads=(2,), size=400)]
    steps.append(step(Kind.CONV, *conv, 5, 0.5, 9, *geometry, reads=(2, 5), size=400))
    steps.append(step(Kind.AVERAGE, 6, 4, 6, 1, 1, 0, 0, 1, 0.5, 0, 0, reads=(6,)))
    steps.append(step(Kind.ADD, 7, 7, 1.0, 0, 1.0, 0, 0.0, 255.0, 0, reads=(7,)))
    blob = assemble(steps, 1, [4, 8])
    end = 8 + int.from_bytes(bytes(blob[16:24].tolist()), "little")
    numbers = [-(2**63), -(2**31), -2, -1, *range(9), 64, 255, 256, 300, 2**31, 2**32, 2**40, 2**63 - 1]
    for word in range(end):
        for value in numbers:
            wrong = blob.clone()
            wrong[8 * word : 8 * word + 8] = torch.tensor(list(struct.pack("=q", value)), dtype=torch.uint8)
            try:
                results = run(wrong, IMAGE)
            except RuntimeError as error:
                assert "fewbit: " in str(error) or "out of memory" in str(error) or "allocate" in str(error)
            else:
                assert sum(result.numel() for result in results) < 1 << 30
    same(run(blob, IMAGE)[0], run(blob, IMAGE)[0], "still works")


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
    for tested_batch in (0, 1, 3):
        test_each_kind_is_its_operator(tested_batch)
    for tested_channels in (3, 67):
        test_quantize_of_any_strides(tested_channels)
    test_max_pool_is_torchs()
    test_slots_are_free_only_after_their_last_reader()
    print(isa)
