"""The search of grids: kernels give the reference's bits; no grid that was tried is better than what is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit import QuantSpec, per_group
from fewbit.methods import blocks as search
from fewbit.methods.blocks import Blocks, best_grid, best_option, levels
from fewbit.ops import native

SPECS = [
    QuantSpec("int4", per_group(32), symmetric=False),
    QuantSpec("int4", per_group(32)),
    QuantSpec("int8", per_group(32), symmetric=False),
    QuantSpec("int6", per_group(32)),
    QuantSpec("uint4", per_group(32), symmetric=False),
]
specs = st.sampled_from(SPECS)
seeds = st.integers(0, 2**32 - 1)


def made(elements: int, count: int, seed: int, weighted: bool) -> Blocks:
    """Blocks of very different sizes, some of zeros, of one value or of one sign."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(elements, count, generator=random)
    w *= 10.0 ** torch.randint(-30, 30, (count,), generator=random)
    kind = torch.randint(0, 8, (count,), generator=random)
    w[:, kind == 0] = 0
    w[:, kind == 1] = w[:1, kind == 1]
    w[:, kind == 2] = w[:, kind == 2].abs()
    w[torch.rand(w.shape, generator=random) < 0.1] = 0
    h = torch.rand(elements, count, generator=random) ** 4 if weighted else None
    if h is not None:
        h[:, kind == 3] = 0
    return Blocks(w, h)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not native.LOADED, reason="there are no kernels here")
@given(specs, st.sampled_from([1, 2, 3, 8, 31, 32, 33, 128]), st.integers(1, 70), seeds, st.booleans())
@settings(max_examples=200)
def test_kernels_give_the_bits_of_the_reference(
    spec: QuantSpec, elements: int, count: int, seed: int, weighted: bool
) -> None:
    blocks = made(elements, count, seed, weighted)
    expected = search._best_grid(blocks, spec, search.SHARES, search._shifts(spec), search.ROUNDS)
    assert same(best_grid(blocks, spec), expected)
    scale, zero = expected
    other = scale * 0.9
    other[::3] = 0
    options = [(scale, zero), (other, zero), (scale * 1.05, (zero + 1).clamp(*spec.number.bound(spec.symmetric)))]
    assert same(best_option(blocks, spec, options), search._best_option(blocks, spec, options, search._shifts(spec)))


@given(specs, seeds)
@settings(max_examples=30)
def test_operators_are_the_reference_without_kernels(spec: QuantSpec, seed: int) -> None:
    blocks = made(32, 20, seed, weighted=True)
    shares, shifts = (torch.tensor([own], dtype=torch.float32) for own in (search.SHARES, search._shifts(spec)))
    codes = (*spec.number.bound(spec.symmetric), spec.symmetric)
    found = search._search_grid(blocks.w, blocks.h, *codes, shares, shifts, search.ROUNDS)
    assert same(found, best_grid(blocks, spec))


@given(specs, seeds)
@settings(max_examples=30)
def test_no_range_is_better_than_the_grid_that_is_found(spec: QuantSpec, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    blocks = Blocks(torch.randn(32, 40, generator=random), torch.rand(32, 40, generator=random))
    scale, zero = best_grid(blocks, spec)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return blocks.sum((blocks.w - scale * levels(blocks.w / scale, spec, zero)).square())

    # What a grid leaves of the sum of squares is compared in float32: for 8 bits a little is lost in that.
    least = error(scale, zero) - 1e-6 * blocks.sum(blocks.w.square())
    low, high = spec.number.bound(spec.symmetric)
    for share in (1.0, 0.8):
        if spec.symmetric:
            tried, start = share * blocks.w.abs().amax(0) / min(-low, high), torch.zeros(40)
        else:
            tried = share * (blocks.w.amax(0).clamp(min=0) - blocks.w.amin(0).clamp(max=0)) / (high - low)
            start = (low - blocks.w.amin(0).clamp(max=0) / tried * share).round().clamp(low, high)
        assert bool((least <= error(tried, start) * (1 + 1e-4)).all())


def test_wrong_arguments_are_refused() -> None:
    w, one = torch.ones(4, 3), torch.ones(1, 1)
    if not native.LOADED:
        pytest.skip("there are no kernels here")
    with pytest.raises(RuntimeError, match=r"h must be contiguous float32 \[4, 3\]"):
        torch.ops.fewbit.search_grid(w, w[:2], -8.0, 7.0, False, one, one, 1)
    with pytest.raises(RuntimeError, match=r"scale must be contiguous float32 \[1, 3\]"):
        torch.ops.fewbit.choose_grid(w, None, one, one, -8.0, 7.0, False, one)
