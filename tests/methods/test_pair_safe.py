"""Pair-safe weights: no sum of two products leaves int16, in the orders that engines multiply in."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbit
from fewbit.methods import METHODS, MeanSquaredError
from fewbit.nn import Conv, Linear, layer_class
from fewbit.ops.pairs import LIMIT, bounded, saturates
from fewbit.pipeline import sites_of
from fewbit.qtensor import dequantize
from fewbit.spec import PER_TENSOR, QuantSpec, per_channel

INT8 = QuantSpec("int8", per_channel(0))
PAIR_SAFE = METHODS["pair_safe"]
PAIRS = (torch.arange(40).reshape(-1, 2),)


def maddubs_saturates(pairs: Tensor) -> bool:
    """Whether vpmaddubsw of two neighbouring codes ``[..., 2]`` saturates for any bytes: the ends are the worst."""
    for bytes_ in itertools.product((0, 255), repeat=2):
        sums = (pairs.long() * torch.tensor(bytes_)).sum(-1)
        if bool((sums.clamp(-(2**15), 2**15 - 1) != sums).any()):
            return True
    return False


def multiplied_together(module: nn.Module, codes: Tensor) -> list[Tensor]:
    """The pairs of codes that engines multiply together: in ONNX Runtime all of a row in turn, channels innermost; in
    OpenVINO the channels of each kernel position."""
    rows = [codes]
    if isinstance(module, nn.Conv2d):
        outputs, channels, *kernel = module.weight.shape
        by_position = codes.reshape(outputs, channels, *kernel).permute(0, 2, 3, 1)
        rows = [by_position.reshape(outputs, -1), by_position] if channels > 1 else []
    return [row[..., : row.shape[-1] // 2 * 2].reshape(*row.shape[:-1], -1, 2) for row in rows]


MODULES = {
    "linear": lambda: nn.Linear(24, 7),
    "linear-odd": lambda: nn.Linear(23, 7),
    "linear-one": lambda: nn.Linear(1, 3),
    "conv": lambda: nn.Conv2d(6, 5, 3),
    "conv-odd": lambda: nn.Conv2d(5, 6, 3),
    "conv-odd-even-kernel": lambda: nn.Conv2d(3, 6, (2, 3)),
    "conv-groups": lambda: nn.Conv2d(12, 8, 3, groups=2),
    "conv-groups-odd": lambda: nn.Conv2d(9, 6, (3, 2), groups=3),
    "pointwise": lambda: nn.Conv2d(16, 8, 1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
}


@pytest.mark.parametrize("name", MODULES)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["normal", "uniform", "signs", "positive", "heavy"]))
@settings(max_examples=15, deadline=None)
def test_no_pair_saturates(name: str, seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    module: Any = MODULES[name]()
    shape = module.weight.shape
    weight = {
        "normal": lambda: torch.randn(shape),
        "uniform": lambda: torch.rand(shape) * 2 - 1,
        "signs": lambda: torch.randint(0, 2, shape) * 2.0 - 1,
        "positive": lambda: torch.ones(shape),
        "heavy": lambda: torch.randn(shape) ** 5,
    }[kind]()
    layer = layer_class(module)
    module.weight = nn.Parameter(weight)
    matrix, pairs = layer.matrices(module)["weight"], layer.pairs(module)
    q = PAIR_SAFE.quantize(matrix.detach(), INT8, None, pairs)
    assert not saturates(q.codes, pairs)
    assert not any(maddubs_saturates(pair) for pair in multiplied_together(module, q.codes))


@given(st.lists(st.integers(-128, 127), min_size=12, max_size=12), st.booleans())
@settings(max_examples=300, deadline=None)
def test_bounded_takes_no_more_than_it_must(values: list[int], two_sets: bool) -> None:
    codes = torch.tensor([values], dtype=torch.int8)
    pairs = (torch.arange(12).reshape(-1, 2), *((torch.arange(1, 11).reshape(-1, 2),) if two_sets else ()))
    kept = codes.clone()
    found = bounded(codes, pairs)
    assert torch.equal(codes, kept) and found.dtype == torch.int8
    wide, before = found.long(), codes.long()
    assert not saturates(found, pairs)
    assert bool((wide.abs() <= before.abs()).all() and (wide * before >= 0).all())
    for columns in pairs:
        for sign in (1, -1):
            sums = (wide[:, columns] * sign).clamp(min=0).sum(2)
            originally = (before[:, columns] * sign).clamp(min=0).sum(2)
            assert bool((sums <= LIMIT).all())
            if not two_sets:
                assert torch.equal(sums, originally.clamp(max=LIMIT))


def test_saturates_agrees_with_the_instruction() -> None:
    codes = torch.arange(-128, 128)
    for first, second in ((64, 64), (127, 1), (127, 2), (-128, 0), (-64, -64), (-65, -64), (127, -128), (100, 29)):
        pair = torch.tensor([[first, second]])
        assert saturates(pair, (torch.tensor([[0, 1]]),)) == maddubs_saturates(pair), (first, second)
    every = torch.cartesian_prod(codes, codes)
    assert saturates(every, (torch.tensor([[0, 1]]),)) and not saturates(every, ())


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_not_much_worse_than_that_of_mse(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(32, 40)
    importance = torch.empty(40).exponential_(1.0)
    for given_importance in (None, importance):
        weighting = torch.ones(40) if given_importance is None else importance

        def error(q: Any, weighting: Tensor = weighting) -> float:
            return float(((dequantize(q) - weight).square() * weighting).sum())

        mse = error(MeanSquaredError().quantize(weight, INT8, given_importance))
        safe = error(PAIR_SAFE.quantize(weight, INT8, given_importance, PAIRS))
        assert mse * 0.99 <= safe < 2 * mse  # one bit less is four times as much


def test_without_pairs_it_is_as_good_as_mse() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 40)
    found, best = (method.quantize(weight, INT8) for method in (PAIR_SAFE, MeanSquaredError()))
    assert float((dequantize(found) - weight).square().sum()) <= 1.01 * float(
        (dequantize(best) - weight).square().sum()
    )


def test_codes_of_other_formats_are_those_of_mse() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 40)
    for spec in (
        QuantSpec("int4", per_channel(0)),
        QuantSpec("int8", PER_TENSOR),
        QuantSpec("uint8", per_channel(0), False),
    ):
        found, expected = PAIR_SAFE.quantize(weight, spec, None, PAIRS), MeanSquaredError().quantize(weight, spec)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale_values, expected.scale_values)


def test_deterministic() -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(8, 40), torch.rand(40)
    first, second = (PAIR_SAFE.quantize(weight, INT8, importance, PAIRS) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale_values, second.scale_values)


@pytest.mark.parametrize("name", ["cnn", "encoder", "mlp", "fashion"])
def test_static_models_are_safe(name: str, request: pytest.FixtureRequest) -> None:
    if name == "fashion":
        task = request.getfixturevalue("fashion")
        model, data = task.model, task.calibration[0].split(50)[:1]
    else:
        model = request.getfixturevalue(name)
        data = request.getfixturevalue({"cnn": "images", "encoder": "tokens", "mlp": "vectors"}[name])
    twins = dict(model.named_modules())
    quantized = fewbit.quantize(model, "int8-static", data)
    checked = 0
    for site, layer in sites_of(quantized):
        if isinstance(layer, (Linear, Conv)):
            codes = layer.qtensor().codes
            module = twins[site] if site in twins else nn.Linear(codes.shape[1], codes.shape[0])
            assert not saturates(codes, layer_class(module).pairs(module)), site
            assert not any(maddubs_saturates(pair) for pair in multiplied_together(module, codes)), site
            checked += 1
    assert checked
