"""GPTQ on the projected target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.methods import Gptq, MeanSquaredError, Moments
from fewbit.methods.gptq import feed_back, target
from fewbit.qtensor import dequantize, empty, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, QuantSpec, per_channel, per_group

TWO_LEVELS = QuantSpec("uint8", per_channel(0), symmetric=False)
SPECS = {
    "groups": QuantSpec("int4", per_group(16)),
    "asymmetric": QuantSpec("int4", per_group(16), symmetric=False),
    "two-level": QuantSpec("int4", per_group(16), symmetric=False, scale=TWO_LEVELS, scale_dtype="bfloat16"),
    "short-last-group": QuantSpec("int4", per_group(28), symmetric=False),
    "rows": QuantSpec("int4", per_channel(0)),
    "tokens": QuantSpec("int8", PER_TOKEN),
    "nf4": QuantSpec("nf4", per_group(16)),
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
ROWS, COLUMNS, TOKENS = 24, 64, 2000


def inputs(drift: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs of the float layer and those that an imperfect prefix makes of them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(7)) / 8
    X = torch.randn(TOKENS, COLUMNS, generator=generator) @ (mix + torch.eye(COLUMNS)) * torch.linspace(0.2, 2, COLUMNS)
    wrong = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(8)) / 8
    return X, X + drift * X @ wrong + drift * torch.randn(TOKENS, COLUMNS, generator=generator)


def moments(X: Tensor, Z: Tensor) -> Moments:
    result = Moments.zeros(X.shape[1])
    result.add(X, Z)
    return result


def weight() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, COLUMNS)


def error(W: Tensor, Q: Tensor, X: Tensor, Z: Tensor) -> float:
    return float((X @ W.T - Z @ Q.T).double().square().sum())


def test_the_projected_target_is_the_same_problem() -> None:
    """|X W' - Z Q'|^2 and |Z (V - Q)'|^2 differ by a constant: for lam = 0."""
    X, Z = (x.double() for x in inputs(drift=0.2))
    W = weight().double()
    V = target(W, moments(X, Z), damping=0.0)
    constants = []
    for seed in range(3):
        Q = W + 0.1 * torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        constants.append(error(W, Q, X, Z) - float((Z @ (V - Q).T).square().sum()))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-10)


def test_loss_is_the_error_up_to_a_constant() -> None:
    X, Z = (x.double() for x in inputs(drift=0.2))
    W, both = weight().double(), moments(X, Z)
    first, second = W + 0.1, W * 0.9
    expected = error(W, first, X, Z) - error(W, second, X, Z)
    assert both.loss(W, first) - both.loss(W, second) == pytest.approx(expected, rel=1e-10)
    assert both.loss(W, W) == 0


def test_without_drift_the_target_is_the_weight() -> None:
    X, _ = inputs(drift=0)
    assert torch.equal(target(weight(), moments(X, X), damping=0.1), weight())


@EVERY
def test_it_beats_rounding_and_the_search_on_tokens_not_seen(spec: QuantSpec) -> None:
    W = weight()
    seen, held_out, new = (inputs(drift=0.1, seed=seed) for seed in range(3))
    q = Gptq().quantize_for(W, spec, moments(*seen), moments(*held_out))
    importance = moments(*seen).H.diagonal().float()
    searched = MeanSquaredError().quantize(W, spec, importance)
    assert error(W, dequantize(q), *new) < 0.8 * error(W, dequantize(searched), *new)
    assert error(W, dequantize(q), *new) < 0.8 * error(W, dequantize(quantize(W, spec)), *new)


@EVERY
def test_the_result_obeys_the_spec(spec: QuantSpec) -> None:
    W = weight()
    kept = W.clone()
    X, Z = inputs(drift=0.1)
    q = Gptq().quantize_for(W, spec, moments(X, Z), moments(X, Z))
    expected = empty((ROWS, COLUMNS), spec)
    assert (q.spec, q.shape, q.packed.shape, q.nbytes) == (spec, W.shape, expected.packed.shape, expected.nbytes)
    assert torch.equal(W, kept)


@EVERY
def test_weights_on_the_grid_stay_as_they_are(spec: QuantSpec) -> None:
    X, _ = inputs(drift=0)
    both = moments(X, X)
    W = dequantize(quantize(weight(), spec))
    q = Gptq().quantize_for(W, spec, both, both)
    # Scales of two levels are rounded anew.
    assert both.loss(W, dequantize(q)) <= (1e-6 if spec.scale is None else 1e-4) * both.loss(W, torch.zeros_like(W))


@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(1)], ids=str)
def test_scales_that_span_rows_are_searched(granularity: object) -> None:
    spec = QuantSpec("int8", granularity)  # type: ignore[arg-type]
    X, Z = inputs(drift=0.1)
    both = moments(X, Z)
    expected = MeanSquaredError().quantize(weight(), spec, (2 * both.H).diagonal().float())
    assert torch.equal(Gptq().quantize_for(weight(), spec, both, both).codes, expected.codes)


def test_more_damping_keeps_the_target_nearer_to_the_weight() -> None:
    both = moments(*inputs(drift=0.2))
    distances = [float((target(weight(), both, d) - weight()).norm()) for d in (0.01, 0.1, 1.0, 100.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.05 * distances[0]


def test_more_damping_of_the_feedback_ends_in_rounding() -> None:
    spec = SPECS["groups"]
    both = moments(*inputs(drift=0))
    searched = MeanSquaredError().quantize(weight(), spec)
    q = feed_back(weight(), spec, both.damped(1e6), searched)
    assert float((q.codes != searched.codes).float().mean()) < 0.01


@EVERY
@pytest.mark.parametrize("kind", ["dead columns", "no tokens", "one token", "equal columns"])
def test_degenerate_inputs(spec: QuantSpec, kind: str) -> None:
    X, _ = inputs(drift=0)
    if kind == "dead columns":
        X[:, ::3] = 0
    elif kind == "equal columns":
        X = X[:, :1].repeat(1, COLUMNS)
    else:
        X = X[: kind == "one token"]
    both = moments(X, X)
    q = Gptq().quantize_for(weight(), spec, both, both)
    searched = MeanSquaredError().quantize(weight(), spec, both.H.diagonal().float())
    assert bool(dequantize(q).isfinite().all())
    assert both.loss(weight(), dequantize(q)) <= both.loss(weight(), dequantize(searched)) * (1 + 1e-6)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    W, (X, Z) = weight(), inputs(drift=0)
    W[0, 0] = torch.nan
    with pytest.raises(ValueError, match="found 1 NaN or infinite"):
        Gptq().quantize_for(W, SPECS["groups"], moments(X, Z), moments(X, Z))
