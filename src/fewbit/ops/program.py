"""Programs: lists of steps on codes that are run by one operator, ``run_program(Tensor[] inputs, Tensor program) -> Tensor[]``.

A program is a uint8 tensor for the machine that made it, not to be saved: int64 words (``MAGIC``; the number of bytes, words
of code, steps, inputs, results and slots; 0), the code, and constants at multiples of 64 bytes. The code of a step is its
``Kind``, where its result goes (a slot of memory; the results of the program are -1, -2, ...), and what ``Kind`` lists. A step
reads the results of earlier ones, by their numbers. Batch sizes are those of the inputs.

Only the compiled kernels have the operator: it computes what those of ``fewbit.ops.codes`` do one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from fewbit.ops.linear import LIBRARY

LIBRARY.define("run_program(Tensor[] inputs, Tensor program) -> Tensor[]")
LIBRARY.impl("run_program", torch.library.fallthrough_kernel, "Autograd")

MAGIC = 0x316D6172676F7270
HEADER, ALIGNMENT = 8, 64  # words, bytes
Word = int | float | Tensor  # a tensor is a constant: the word is where it is


class Kind(IntEnum):
    """What a step does, and the words that say how; pairs are of the height and the width, ``[]`` counts what follows."""

    QUANTIZE = 0  # input, whether it is [batch, channels, height, width], scale, zero_point
    CODES = 1  # input: of codes, as they are
    # x, outputs, channels, height, width, groups, packed, multiplier, offset, whether no |multiplier| is above 0.25,
    # low, high, zero_point (-1: to float32), other (-1: none), other_multiplier, other_zero_point, stride, padding, dilation,
    # input_zero_point
    CONV = 2
    LINEAR = 3  # the same up to other_zero_point
    ADD = 4  # a, b, a_multiplier, a_zero_point, b_multiplier, b_zero_point, low, high, zero_point
    AVERAGE = 5  # x, kernel, stride, padding, count_include_pad, multiplier, input_zero_point, zero_point
    LOOKUP = 6  # x, table
    MAX_POOL = 7  # x, kernel, stride, padding, dilation, ceil_mode
    CAT = 8  # axis, [], values
    RESHAPE = 9  # x, [] shape before, [] after; both but for the first axis. No byte moves
    DEQUANTIZE = 10  # x, scale, zero_point


@dataclass(frozen=True)
class Step:
    """``reads``: the steps whose results are among ``words``; ``size``: bytes of the result for some batch."""

    kind: Kind
    words: tuple[Word, ...]
    reads: tuple[int, ...]
    size: int


def assemble(steps: Sequence[Step], inputs: int, results: Sequence[int]) -> Tensor:
    """The program that returns the results of these steps, in order."""
    steps, results = list(steps), list(results)
    owners = _owners(steps)
    for i, result in enumerate(results):
        if steps[result].kind in (Kind.CODES, Kind.RESHAPE) or result in results[:i]:  # no memory of its own: copied
            steps.append(Step(Kind.CAT, (0, 1, result), (result,), steps[result].size))
            owners.append(len(steps) - 1)
            results[i] = len(steps) - 1
    places = _places(steps, owners, results)
    words: list[Word] = []
    for step, place in zip(steps, places, strict=True):
        words += [int(step.kind), place, *step.words]
    end = 8 * (HEADER + len(words))
    constants: list[tuple[int, Tensor]] = []
    code: list[bytes] = []
    for word in words:
        if isinstance(word, Tensor):
            end = -(-end // ALIGNMENT) * ALIGNMENT
            constants.append((end, word.contiguous().reshape(-1).view(torch.uint8)))
            word, end = end, end + constants[-1][1].numel()
        code.append(struct.pack("=d" if isinstance(word, float) else "=q", word))
    slots = max([place + 1 for place in places], default=0)
    header = struct.pack("=8q", MAGIC, end, len(words), len(steps), inputs, len(results), slots, 0)
    program = torch.zeros(end, dtype=torch.uint8)
    start = header + b"".join(code)
    program[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
    for place, constant in constants:
        program[place : place + len(constant)] = constant
    return program


def _owners(steps: Sequence[Step]) -> list[int]:
    """For each step the one whose memory its result lies in."""
    owners: list[int] = []
    for i, step in enumerate(steps):
        owners.append(owners[step.reads[0]] if step.kind == Kind.RESHAPE else i)
    return owners


def _places(steps: Sequence[Step], owners: Sequence[int], results: Sequence[int]) -> list[int]:
    """Where results go: a slot is free again as soon as its last reader is done."""
    last = {owners[i]: i for i in range(len(steps))}
    for i, step in enumerate(steps):
        last.update((owners[value], i) for value in step.reads)
    sizes: list[int] = []  # of slots
    free: list[int] = []
    places: list[int] = []
    for i, step in enumerate(steps):
        if i in results:
            places.append(-1 - results.index(i))
        elif step.kind in (Kind.CODES, Kind.RESHAPE):
            places.append(0)
        else:
            enough = [slot for slot in free if sizes[slot] >= step.size]
            if enough:
                slot = min(enough, key=lambda slot: sizes[slot])
            elif free:
                slot = max(free, key=lambda slot: sizes[slot])
            else:
                slot = len(sizes)
                sizes.append(0)
                free.append(slot)
            free.remove(slot)
            sizes[slot] = max(sizes[slot], step.size)
            places.append(slot)
        for value in {owners[value] for value in (i, *step.reads)}:
            if last[value] == i and places[value] >= 0 and steps[value].kind != Kind.CODES:
                free.append(places[value])
    return places
