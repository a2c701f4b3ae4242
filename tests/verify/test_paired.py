"""Paired evidence: intervals, tests and verdicts, against scipy and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fewbit import Budget, EvaluationError
from fewbit.verify import judge, paired, scores_of
from fewbit.verify.paired import mcnemar, student_t


def binary(both: int, lost: int, won: int, neither: int) -> tuple[Tensor, Tensor]:
    """0/1 scores of a float and a quantized model with these counts."""
    first = [1.0] * both + [1.0] * lost + [0.0] * won + [0.0] * neither
    second = [1.0] * both + [0.0] * lost + [1.0] * won + [0.0] * neither
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


def normal(count: int, drop: float, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(count, generator=generator, dtype=torch.float64)
    return exact, exact - drop - spread * torch.randn(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [2, 3, 5, 12, 200])
def test_interval_is_students(count: int, confidence: float) -> None:
    exact, found = normal(count, 0.1, 1.0)
    evidence = paired(exact, found)
    difference = (exact - found).numpy()
    expected = stats.t.interval(confidence, count - 1, difference.mean(), stats.sem(difference))
    assert evidence.drop == pytest.approx(difference.mean()) and evidence.p_value is None and not evidence.binary
    assert evidence.interval(confidence) == pytest.approx(expected, rel=0.02, abs=1e-3)


@pytest.mark.parametrize("probability", [0.9, 0.95, 0.975, 0.995])
@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 10, 100, 10000])
def test_student_quantiles(degrees: int, probability: float) -> None:
    z = NormalDist().inv_cdf(probability)
    assert student_t(z, degrees) == pytest.approx(float(stats.t.ppf(probability, degrees)), rel=0.05)
    if degrees != 3:
        assert student_t(z, degrees) == pytest.approx(float(stats.t.ppf(probability, degrees)), rel=0.005)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 5), (3, 3), (10, 2), (150, 100), (5000, 4800)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("counts", [(90, 5, 3, 2), (50, 0, 0, 50), (0, 10, 0, 0), (900, 30, 10, 60)], ids=str)
def test_binary_scores_by_hand(counts: tuple[int, int, int, int]) -> None:
    _, lost, won, _ = counts
    total = sum(counts)
    evidence = paired(*binary(*counts))
    assert (evidence.count, evidence.lost, evidence.won, evidence.binary) == (total, lost, won, True)
    assert evidence.drop == pytest.approx((lost - won) / total)
    assert evidence.p_value == mcnemar(lost, won)
    # Agresti and Min: half an observation more in each of the four cells.
    b, c, n = lost + 0.5, won + 0.5, total + 2
    error = math.sqrt(b + c - (b - c) ** 2 / n) / n
    half = 1.959964 * error
    assert evidence.interval() == pytest.approx(((b - c) / n - half, (b - c) / n + half), rel=1e-5)


def test_binary_interval_does_not_collapse_without_flips() -> None:
    low, high = paired(*binary(80, 0, 0, 20)).interval() or (0, 0)
    assert low < -0.01 and high > 0.01


@pytest.mark.parametrize("drop", [0.0, 0.02, 0.05])
def test_binary_interval_covers_the_true_drop(drop: float) -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        uniform = torch.rand(200, generator=generator)
        lost, won = int((uniform < 0.03 + drop).sum()), int((uniform > 0.97).sum())
        low, high = paired(*binary(200 - lost - won, lost, won, 0)).interval() or (0, 0)
        covered += low <= drop <= high
    assert covered >= 0.93 * 400


def test_one_number_has_no_interval() -> None:
    evidence = paired(torch.tensor(0.9), torch.tensor(0.85))
    assert (evidence.count, evidence.interval(), evidence.p_value) == (1, None, None)
    assert evidence.drop == pytest.approx(0.05)


def test_one_example_says_nothing() -> None:
    evidence = paired(torch.tensor([0.3]), torch.tensor([0.2]))
    assert evidence.interval() == (-math.inf, math.inf)
    assert judge(evidence, Budget(0.5)).verdict == "not_enough_data"


def test_scores_and_flips() -> None:
    evidence = paired(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0]))
    assert (evidence.float_score, evidence.quantized_score) == (2.0, pytest.approx(6.5 / 3))
    assert (evidence.lost, evidence.won) == (1, 1)


def test_json_has_plain_numbers() -> None:
    data = paired(*binary(90, 5, 3, 2)).to_json()
    assert set(data) == {"count", "float_score", "quantized_score", "drop", "interval", "lost", "won", "p_value"}
    assert all(isinstance(number, (int, float)) for key, number in data.items() if key != "interval")


def test_different_examples_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"\[3\] scores for the float model and \[2\] for the quantized"):
        paired(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize(
    ("scores", "max_drop", "verdict"),
    [
        (binary(9900, 30, 20, 50), 0.01, "pass"),
        (binary(900, 100, 0, 0), 0.01, "fail"),
        (binary(95, 1, 1, 3), 0.01, "not_enough_data"),
        (normal(1000, 0.0, 0.1), 0.05, "pass"),
        (normal(1000, 0.2, 0.1), 0.05, "fail"),
        (normal(10, 0.05, 0.5), 0.05, "not_enough_data"),
        ((torch.tensor(0.9), torch.tensor(0.895)), 0.01, "pass"),
        ((torch.tensor(0.9), torch.tensor(0.88)), 0.01, "fail"),
    ],
    ids=["0/1-pass", "0/1-fail", "0/1-open", "real-pass", "real-fail", "real-open", "number-pass", "number-fail"],
)
def test_verdicts(scores: tuple[Tensor, Tensor], max_drop: float, verdict: str) -> None:
    found = judge(paired(*scores), Budget(max_drop))
    assert found.verdict == verdict and "drop" in found.reason
    assert (found.needed is not None) == (verdict == "not_enough_data")


def test_verdict_is_one_sided_at_the_confidence() -> None:
    exact, found = normal(400, 0.02, 0.2, seed=3)
    difference = (exact - found).numpy()
    bound = difference.mean() + stats.t.ppf(0.9, 399) * stats.sem(difference)
    for shift, verdict in ((1e-4, "pass"), (-1e-4, "not_enough_data")):
        assert judge(paired(exact, found), Budget(float(bound) + shift, confidence=0.9)).verdict == verdict


def test_error_is_divided_among_the_trials() -> None:
    exact, found = normal(400, 0.02, 0.2, seed=3)
    difference = (exact - found).numpy()
    bound = difference.mean() + stats.t.ppf(1 - 0.05 / 4, 399) * stats.sem(difference)
    evidence, budget = paired(exact, found), Budget(float(bound) - 1e-4)
    assert judge(evidence, budget, trials=1).verdict == judge(evidence, budget, trials=3).verdict == "pass"
    assert judge(evidence, budget, trials=4).verdict == "not_enough_data"


def decided(draw: Callable[[int, int], tuple[Tensor, Tensor]], needed: int, count: int) -> float:
    verdicts = [judge(paired(*draw(count + needed, seed)), Budget(0.02)).verdict for seed in range(1, 201)]
    return sum(verdict != "not_enough_data" for verdict in verdicts) / len(verdicts)


def test_the_needed_count_decides_most_of_the_time() -> None:
    # What one draw suggests varies with its drop: evidence whose drop is the true one is judged.
    exact, found = normal(100, 0.01, 0.1)
    found = found + (exact - found).mean() - 0.01
    verdict = judge(paired(exact, found), Budget(0.02))
    assert verdict.verdict == "not_enough_data" and verdict.needed is not None
    assert 0.65 <= decided(lambda count, seed: normal(count, 0.01, 0.1, seed), verdict.needed, 100) <= 0.95
    assert decided(lambda count, seed: normal(count, 0.01, 0.1, seed), 0, 100) < 0.5


def test_the_needed_count_decides_most_of_the_time_for_binary_scores() -> None:
    def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        lost, won = int((uniform < 0.02).sum()), int((uniform > 0.98).sum())
        return binary(count - lost - won, lost, won, 0)

    verdict = judge(paired(*binary(96, 2, 2, 0)), Budget(0.02))
    assert verdict.verdict == "not_enough_data" and verdict.needed is not None
    assert 0.65 <= decided(draw, verdict.needed, 100) <= 0.97


def test_needed_is_unknown_where_the_drop_is_the_budget() -> None:
    verdict = judge(paired(*binary(96, 3, 1, 0)), Budget(0.02))
    assert verdict.verdict == "not_enough_data" and verdict.needed is None and "too near" in verdict.reason


@pytest.mark.parametrize("result", [0.5, 1, torch.tensor(0.5), torch.tensor([0.1, 0.9]), [0, 1, 1], (True, False)])
def test_usable_scores(result: Any) -> None:
    scores = scores_of(lambda _: result, nn.Identity(), "float")
    assert scores.dtype == torch.float64 and torch.equal(scores, torch.as_tensor(result).double())


def test_scores_with_a_graph_are_detached() -> None:
    assert not scores_of(lambda m: m(torch.ones(3, requires_grad=True)), nn.Identity(), "float").requires_grad


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("0.9", r"evaluate\(int8\) returned a str"),
        (None, "returned a NoneType"),
        ({"accuracy": 0.9}, "returned a dict"),
        (torch.ones(2, 2), r"shape \[2, 2\]; it must be 1-D"),
        (torch.ones(0), r"shape \[0\]"),
        (torch.tensor([0.0, math.nan, math.inf]), "2 NaN or infinite of 3 scores"),
        (math.nan, "1 NaN or infinite of 1 scores"),
    ],
    ids=["str", "none", "dict", "matrix", "empty", "nan-in-scores", "nan"],
)
def test_unusable_scores_are_refused(result: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        scores_of(lambda _: result, nn.Identity(), "int8")


def test_what_evaluate_raises_is_named_and_kept() -> None:
    def evaluate(_: nn.Module) -> float:
        raise KeyError("label")

    with pytest.raises(EvaluationError, match=r"evaluate\(float\) raised KeyError: 'label'") as caught:
        scores_of(evaluate, nn.Identity(), "float")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("arguments", [(-0.1,), (math.nan,), (math.inf,), (0.1, 0.5), (0.1, 1.0), (0.1, 95)], ids=str)
def test_impossible_budgets_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(EvaluationError, match="needs a number"):
        Budget(*arguments)
