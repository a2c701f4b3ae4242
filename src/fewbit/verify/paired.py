"""Paired evidence: what a quantized model lost on the very examples that the float model was scored on.

Intervals: for scores that are all 0 or 1, Agresti and Min's adjusted Wald interval for matched pairs (Statistics in
Medicine 24, 2005), which does not collapse when no example flips; else Student's t for the mean difference. The test for
0/1 scores is McNemar's, exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbit.batches import evaluating
from fewbit.errors import EvaluationError

POWER = 0.8  # with which "how many more" would decide


@dataclass(frozen=True)
class Budget:
    """What may be lost: ``max_drop`` in the units of the score, to be shown at ``confidence`` (one-sided)."""

    max_drop: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise EvaluationError(f"max_drop: found {self.max_drop}, needs a number >= 0 in the units of the score.")
        if not 0.5 < self.confidence < 1:
            raise EvaluationError(f"confidence: found {self.confidence}, needs a number between 0.5 and 1.")


@dataclass(frozen=True)
class Paired:
    """Scores of the float and the quantized model, example by example. Higher is better; ``drop`` > 0 is a loss.

    ``count`` is 1 and ``error`` None where evaluate returned one number. ``lost`` and ``won``: examples whose score fell
    and rose. ``p_value``: exact McNemar, None unless scores are 0/1. ``centre`` and ``error``: what intervals are made of.
    """

    count: int
    float_score: float
    quantized_score: float
    drop: float
    lost: int
    won: int
    binary: bool
    p_value: float | None
    centre: float
    error: float | None

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Two-sided interval of the drop; None where evaluate returned one number."""
        if self.error is None:
            return None
        half = self._quantile(0.5 + confidence / 2) * self.error
        return self.centre - half, self.centre + half

    def _quantile(self, probability: float) -> float:
        z = NormalDist().inv_cdf(probability)
        return z if self.binary else student_t(z, self.count - 1)

    def to_json(self) -> dict[str, Any]:
        interval = self.interval()
        return {
            "count": self.count,
            "float_score": self.float_score,
            "quantized_score": self.quantized_score,
            "drop": self.drop,
            "interval": None if interval is None else list(interval),
            "lost": self.lost,
            "won": self.won,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Verdict:
    """``needed``: how many more examples would probably (power 80 %) decide, if it is not decided and that is known."""

    verdict: Literal["pass", "fail", "not_enough_data"]
    reason: str
    needed: int | None = None


def scores_of(evaluate: Callable[[nn.Module], Any], model: nn.Module, what: str) -> Tensor:
    """What ``evaluate`` says of a model, as float64 ``[examples]``, or ``[]`` for one number.

    EvaluationError if it raises, or returns anything but finite numbers.
    """
    try:
        with evaluating(model):  # whatever mode evaluate leaves it in
            result = evaluate(model)
    # evaluate is the user's: whatever it raises is about it.
    except Exception as error:
        raise EvaluationError(f"evaluate({what}) raised {type(error).__name__}: {error}") from error
    try:
        scores = torch.as_tensor(result).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise EvaluationError(
            f"evaluate({what}) returned a {type(result).__name__}; it must return a 1-D tensor of per-example scores, "
            "higher being better, or one float."
        ) from None
    if scores.dim() > 1 or scores.numel() == 0:
        raise EvaluationError(
            f"evaluate({what}) returned a tensor of shape {list(scores.shape)}; it must be 1-D, one score an example."
        )
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise EvaluationError(f"evaluate({what}) returned {bad} NaN or infinite of {scores.numel()} scores.")
    return scores


def paired(float_scores: Tensor, quantized_scores: Tensor) -> Paired:
    """The evidence in two score tensors of ``scores_of``; EvaluationError if their shapes differ."""
    if float_scores.shape != quantized_scores.shape:
        raise EvaluationError(
            f"evaluate returned {list(float_scores.shape)} scores for the float model and "
            f"{list(quantized_scores.shape)} for the quantized one; it must score the same examples."
        )
    difference = float_scores - quantized_scores
    lost, won = int((difference > 0).sum()), int((difference < 0).sum())
    count = difference.numel()
    both = torch.cat([float_scores.reshape(-1), quantized_scores.reshape(-1)])
    binary = float_scores.dim() == 1 and bool(((both == 0) | (both == 1)).all())
    drop = float(difference.mean())
    centre, error = drop, None
    if binary:
        adjusted = count + 2
        centre = (lost - won) / adjusted
        error = math.sqrt((lost + won + 1) - (lost - won) ** 2 / adjusted) / adjusted
    elif float_scores.dim() == 1:
        error = float(difference.std() / math.sqrt(count)) if count > 1 else math.inf
    return Paired(
        count=count,
        float_score=float(float_scores.mean()),
        quantized_score=float(quantized_scores.mean()),
        drop=drop,
        lost=lost,
        won=won,
        binary=binary,
        p_value=mcnemar(lost, won) if binary else None,
        centre=centre,
        error=error,
    )


def judge(evidence: Paired, budget: Budget, trials: int = 1) -> Verdict:
    """Whether the drop is shown to be within the budget, or shown to be beyond it.

    ``trials``: how many models were tried on these examples; the error allowed is divided among them (Bonferroni).
    """
    if evidence.error is None:
        within = evidence.drop <= budget.max_drop
        reason = f"drop {evidence.drop:.4g}; evaluate returned one number, so chance is not accounted for"
        return Verdict("pass" if within else "fail", reason)
    confidence = 1 - (1 - budget.confidence) / trials
    half = evidence._quantile(confidence) * evidence.error
    low, high = evidence.centre - half, evidence.centre + half
    if high <= budget.max_drop:
        return Verdict("pass", f"drop at most {high:.4g} with {100 * confidence:.4g} % confidence")
    if low > budget.max_drop:
        return Verdict("fail", f"drop at least {low:.4g} with {100 * confidence:.4g} % confidence")
    needed = _needed(evidence, budget, confidence)
    more = "the drop is too near the budget to say how many would" if needed is None else f"about {needed} more would"
    return Verdict("not_enough_data", f"drop between {low:.4g} and {high:.4g}: undecided; {more} decide", needed)


def _needed(evidence: Paired, budget: Budget, confidence: float) -> int | None:
    assert evidence.error is not None
    distance = abs(budget.max_drop - evidence.drop)
    if distance == 0 or not math.isfinite(evidence.error):
        return None
    variance = evidence.error**2 * evidence.count
    z = NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(POWER)
    total = math.ceil(z**2 * variance / distance**2)
    return max(1, total - evidence.count)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of ``lost`` and ``won`` flips if both directions were equally likely."""
    total = lost + won
    if total == 0:
        return 1.0
    tail = sum(
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2))
        for k in range(min(lost, won) + 1)
    )
    return min(1.0, 2 * tail)


def student_t(z: float, degrees: int) -> float:
    """Student's t quantile from the normal quantile z: Cornish-Fisher (Abramowitz and Stegun 26.7.5), exact for 1 and 2."""
    if degrees < 1:
        return math.inf
    probability = NormalDist().cdf(z)
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    n = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
