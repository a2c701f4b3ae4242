"""The search for the range of least squared error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit.methods import METHODS
from fewbit.qtensor import QTensor, dequantize, qparams, quantize, quantize_with, value_range
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

MSE = METHODS["mse"]
INT4 = {
    "rows": QuantSpec("int4", per_channel(0)),
    "groups": QuantSpec("int4", per_group(16)),
    "groups-asymmetric": QuantSpec("int4", per_group(16), symmetric=False),
    "tensor": QuantSpec("int4", PER_TENSOR),
    "columns": QuantSpec("int4", per_channel(1)),
    "nf4": QuantSpec("nf4", per_group(16)),
}
SMALL_BLOCKS = pytest.mark.parametrize("name", ["rows", "groups", "groups-asymmetric", "nf4"])
EVERY_INT4 = pytest.mark.parametrize("spec", INT4.values(), ids=INT4.keys())


def weight_and_importance() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(40, 70), torch.empty(70).exponential_(1.0) ** 4


def weighted_error(weight: Tensor, q: QTensor, importance: Tensor) -> float:
    return float(((weight - dequantize(q)).square() * importance).sum())


@EVERY_INT4
def test_four_bit_error_is_lower_than_that_of_rtn(spec: QuantSpec) -> None:
    weight, _ = weight_and_importance()
    ones = torch.ones(())
    assert weighted_error(weight, MSE.quantize(weight, spec), ones) < weighted_error(
        weight, quantize(weight, spec), ones
    )


@pytest.mark.parametrize("seed", range(3))
def test_two_level_scales_do_not_make_it_worse_than_rtn(seed: int) -> None:
    torch.manual_seed(seed)
    weight, ones = torch.randn(6, 23) ** 3, torch.ones(())
    spec = QuantSpec("int4", per_group(5), scale=QuantSpec("int4", per_group(4)))
    rounded = weighted_error(weight, quantize(weight, spec), ones)
    assert weighted_error(weight, MSE.quantize(weight, spec), ones) <= rounded * (1 + 1e-6)


@SMALL_BLOCKS
def test_importance_lowers_the_weighted_error(name: str) -> None:
    spec = INT4[name]
    weight, importance = weight_and_importance()
    importance[::7] = 100  # the largest of a block are often among those that do not matter
    weight[:, 3::7] *= 2
    with_it = weighted_error(weight, MSE.quantize(weight, spec, importance), importance)
    without = weighted_error(weight, MSE.quantize(weight, spec), importance)
    assert with_it < without


@SMALL_BLOCKS
def test_importance_of_each_element_is_used(name: str) -> None:
    spec = INT4[name]
    weight, importance = weight_and_importance()
    of_elements = importance * torch.rand(40, 1) + torch.rand(40, 70) ** 4
    with_it = weighted_error(weight, MSE.quantize(weight, spec, of_elements), of_elements)
    assert with_it < weighted_error(weight, MSE.quantize(weight, spec), of_elements)


@EVERY_INT4
def test_importance_of_columns_is_that_of_elements_repeated(spec: QuantSpec) -> None:
    weight, importance = weight_and_importance()
    by_column = MSE.quantize(weight, spec, importance)
    by_element = MSE.quantize(weight, spec, importance.expand(40, 70))
    assert torch.equal(by_column.codes, by_element.codes)
    assert torch.equal(by_column.scale_values, by_element.scale_values)


@EVERY_INT4
@pytest.mark.parametrize("share", [1.0, 0.93, 0.85, 0.75, 0.6])
def test_no_share_of_its_range_is_better_for_a_weight(spec: QuantSpec, share: float) -> None:
    weight, _ = weight_and_importance()
    low, high = value_range(weight, spec)
    clipped = quantize_with(weight, spec, *qparams(low * share, high * share, spec))
    best = weighted_error(weight, MSE.quantize(weight, spec), torch.ones(()))
    assert best <= weighted_error(weight, clipped, torch.ones(())) * (1 + 1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_near_the_best_of_a_fine_grid(symmetric: bool) -> None:
    """All scales and zero points of 200 blocks, tried one after the other."""
    spec = QuantSpec("int4", per_channel(0), symmetric=symmetric)
    torch.manual_seed(0)
    weight, importance = torch.randn(200, 32), torch.rand(32)
    low, high = spec.number.bound(symmetric)
    full = weight.abs().amax(1, keepdim=True) / 7
    least = torch.full((200,), torch.inf)
    for zero in [0] if symmetric else range(int(low), int(high) + 1):
        for share in torch.linspace(0.4, 1.1, 71):
            d = torch.clamp((weight / (full * share)).round(), low - zero, high - zero)
            least = torch.minimum(least, ((d * full * share - weight).square() * importance).sum(1))
    found = weighted_error(weight, MSE.quantize(weight, spec, importance), importance)
    assert found <= 1.03 * float(least.sum())


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_two_level_scales_cost_next_to_nothing(scale_dtype: str) -> None:
    plain = QuantSpec("int4", per_group(16), symmetric=False)
    level = QuantSpec("uint8", per_channel(0), symmetric=False)
    weight, importance = weight_and_importance()
    exact = MSE.quantize(weight, plain, importance)
    two = MSE.quantize(weight, replace(plain, scale=level, scale_dtype=scale_dtype), importance)
    assert weighted_error(weight, two, importance) < 1.02 * weighted_error(weight, exact, importance)
    assert two.nbytes < exact.nbytes


@pytest.mark.parametrize("granularity", [per_channel(0), PER_TOKEN, per_group(16), PER_TENSOR, per_channel(1)], ids=str)
@pytest.mark.parametrize("kind", ["none", "columns", "elements"])
@pytest.mark.parametrize("piece", [1, 70, 200])
def test_searching_in_pieces_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, granularity: Granularity, kind: str, piece: int
) -> None:
    weight, columns = weight_and_importance()
    importance = {"none": None, "columns": columns, "elements": columns * torch.rand(40, 70)}[kind]
    spec = QuantSpec("int4", granularity)
    whole = MSE.quantize(weight, spec, importance)
    monkeypatch.setattr("fewbit.methods.mse.PIECE", piece)
    pieces = MSE.quantize(weight, spec, importance)
    # How torch adds up depends on how much there is, and the last bit decides among grids that are as good as each other.
    weights = torch.ones(()) if importance is None else importance
    assert weighted_error(weight, pieces, weights) == pytest.approx(weighted_error(weight, whole, weights), rel=1e-3)


def test_the_full_range_is_kept_where_nothing_is_gained() -> None:
    weight = torch.tensor([[-7.0, -3.0, 0.0, 1.0, 7.0]])
    q = MSE.quantize(weight, QuantSpec("int4", per_channel(0)))
    assert q.scale_values.tolist() == [[1.0]]
    assert torch.equal(dequantize(q), weight)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_a_weight_without_elements(shape: tuple[int, int]) -> None:
    q = MSE.quantize(torch.zeros(shape), QuantSpec("int8", per_channel(0)))
    assert q.shape == shape
    assert dequantize(q).shape == shape
