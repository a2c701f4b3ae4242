"""Histograms: exact counts, and ranges that are worth their clipping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.observers import OBSERVERS, Histogram, RangeObserver, State
from fewbit.observers.histogram import BINS
from fewbit.qtensor import fake_quantize, qparams
from fewbit.spec import QuantSpec

SPECS = {
    "int8": QuantSpec("int8"),
    "uint8": QuantSpec("uint8", symmetric=False),
    "int4": QuantSpec("int4"),
    "int4-asymmetric": QuantSpec("int4", symmetric=False),
}


def observed(observer: RangeObserver, *batches: Tensor) -> State:
    state = observer.init()
    for batch in batches:
        state = observer.update(state, batch)
    return state


def error(x: Tensor, observer: RangeObserver, spec: QuantSpec) -> float:
    """The mean squared error of ``x`` quantized on the range that the observer chooses."""
    scale, zero_point = qparams(*(end.reshape(1) for end in observer.choose_range(observed(observer, x), spec)), spec)
    assert isinstance(scale, Tensor)
    return float((fake_quantize(x, spec, scale, zero_point) - x).square().mean())


def heavy_tailed() -> Tensor:
    """Laplace-like values, some far out."""
    torch.manual_seed(0)
    x = torch.randn(20_000) * torch.empty(20_000).exponential_(1.0)
    x[:5] *= 20
    return x


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(2, 50), st.integers(-6, 6), st.sampled_from([0.0, 5.0])), min_size=1, max_size=4),
    st.integers(0, 2**16),
)
def test_every_value_is_counted_in_its_bin(parts: list[tuple[int, int, float]], seed: int) -> None:
    torch.manual_seed(seed)
    batches = [(torch.randn(length) + centre) * 10.0**power for length, power, centre in parts]
    state = observed(Histogram("mse"), *batches)
    data, width = torch.cat(batches).double(), 2.0 ** int(state["exponent"])
    bins = torch.floor(data / width).long() - state["first"]
    assert len(state["counts"]) <= BINS
    assert int(state["counts"].sum()) == len(data)
    assert torch.equal(torch.bincount(bins, minlength=len(state["counts"])), state["counts"])
    assert (float(state["low"]), float(state["high"])) == (float(data.min()), float(data.max()))


@settings(max_examples=50)
@given(st.permutations(range(5)), st.integers(0, 2**16))
def test_the_order_of_the_data_does_not_matter(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    batches = [torch.randn(30) * 10.0**power for power in (-6, -2, 0, 3, 8)]
    observer = Histogram("mse")
    state, other = observed(observer, *batches), observed(observer, *(batches[index] for index in order))
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("small", [1e-30, 1e-38])
def test_the_order_does_not_matter_where_values_underflow(small: float) -> None:
    observer = Histogram("mse")
    a, b = torch.tensor([-small, 2 * small, small / 3]), torch.tensor([3e38, -3e38])
    first, second = observed(observer, a, b), observed(observer, b, a)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_neighbours_in_float64_are_counted() -> None:
    x = torch.tensor([1.0, 1.0 + 2.3e-16], dtype=torch.float64)
    assert int(observed(Histogram("mse"), x)["counts"].sum()) == 2


def test_the_bins_are_as_fine_as_their_number_allows() -> None:
    state = observed(Histogram("mse"), torch.linspace(-1, 1, 1000))
    assert int(state["exponent"]) == -10  # 2,049 bins: one finer would need 4,097
    state = observed(Histogram("mse"), torch.linspace(0, 0.99, 1000))
    assert int(state["exponent"]) == -12


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_mse_clips_heavy_tails_and_lowers_the_error(spec: QuantSpec) -> None:
    x = heavy_tailed()
    observer = OBSERVERS["mse"]
    low, high = observer.choose_range(observed(observer, x), spec)
    assert float(x.min()) < float(low)
    assert float(high) < float(x.max())
    assert error(x, observer, spec) < 0.97 * error(x, OBSERVERS["minmax"], spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_mse_is_nearly_the_best_range_of_all(spec: QuantSpec) -> None:
    x = heavy_tailed()
    ends = float(x.min()), float(x.max())
    errors = []
    for share in torch.linspace(0.05, 1, 96).tolist():
        scale, zero_point = qparams(torch.tensor([ends[0] * share]), torch.tensor([ends[1] * share]), spec)
        assert isinstance(scale, Tensor)
        errors.append(float((fake_quantize(x, spec, scale, zero_point) - x).square().mean()))
    assert error(x, OBSERVERS["mse"], spec) <= 1.05 * min(errors)


def test_mse_is_nearly_the_best_range_of_a_codebook() -> None:
    torch.manual_seed(0)
    x, spec = torch.randn(40_000), QuantSpec("nf4")
    scales = torch.linspace(0.5, 5, 91).reshape(-1, 1)
    errors = [float((fake_quantize(x, spec, scale) - x).square().mean()) for scale in scales]
    assert error(x, OBSERVERS["mse"], spec) <= 1.05 * min(errors)


def test_mse_clips_one_tail_and_keeps_the_other() -> None:
    torch.manual_seed(0)
    x = torch.rand(50_000)
    x[0] = 30.0
    x -= 0.5
    low, high = OBSERVERS["mse"].choose_range(observed(OBSERVERS["mse"], x), SPECS["int4-asymmetric"])
    assert float(low) == pytest.approx(-0.5, abs=0.1)
    assert float(high) < 5


@pytest.mark.parametrize("percentile", [99.9, 99.99, 90.0])
def test_percentile_of_evenly_spaced_values(percentile: float) -> None:
    x = torch.linspace(-1, 1, 100_001)
    observer = Histogram("percentile", percentile)
    low, high = observer.choose_range(observed(observer, x), QuantSpec("int8"))
    assert float(high) == pytest.approx(percentile / 100, abs=2e-5)
    assert float(low) == pytest.approx(-percentile / 100, abs=2e-5)


def test_percentile_counts_on_both_sides() -> None:
    x = torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([50.0])])
    observer = OBSERVERS["percentile_99.9"]
    low, high = observer.choose_range(observed(observer, x), QuantSpec("int8"))
    assert 0 <= float(low) < 0.02
    assert 0.98 < float(high) < 1.02


def test_percentile_100_is_the_whole_range() -> None:
    x = heavy_tailed()
    observer = Histogram("percentile", 100.0)
    low, high = observer.choose_range(observed(observer, x), QuantSpec("int8"))
    assert (float(low), float(high)) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("spec", [SPECS["int8"], SPECS["uint8"]], ids=["int8", "uint8"])
def test_entropy_leaves_out_a_far_outlier_and_keeps_the_bulk(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    x[0] = 40.0
    observer = OBSERVERS["entropy"]
    low, high = observer.choose_range(observed(observer, x), spec)
    assert 2.5 < float(high) < 20
    assert float(low) <= -2.5 or (spec.symmetric and float(high) >= 2.5)


@pytest.mark.parametrize("name", ["mse", "percentile_99.999"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_values_after_relu_keep_zero_as_their_low_end(name: str, spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000).relu()
    low, high = OBSERVERS[name].choose_range(observed(OBSERVERS[name], x), spec)
    assert abs(float(low)) < 1e-3
    assert 1.5 < float(high) <= float(x.max())


def test_entropy_keeps_data_away_from_zero() -> None:
    torch.manual_seed(0)
    x = 1000 + torch.rand(1000)
    _, high = OBSERVERS["entropy"].choose_range(observed(OBSERVERS["entropy"], x), SPECS["int8"])
    assert float(high) >= 1000


@pytest.mark.parametrize("spec", [SPECS["int8"], SPECS["uint8"]], ids=["int8", "uint8"])
def test_entropy_of_values_after_relu_keeps_the_bulk(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000).relu()
    _, high = OBSERVERS["entropy"].choose_range(observed(OBSERVERS["entropy"], x), spec)
    assert float((x > float(high)).float().mean()) < 0.01
