"""What a search found: every trial with its measurements, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fewbit.hardware import Machine
from fewbit.plan import Plan
from fewbit.report import write_report, write_text
from fewbit.targets import save
from fewbit.targets.native import REPORT
from fewbit.verify import Budget, Latency, OutputError, Paired, Verdict

FLOAT = "float"


@dataclass(frozen=True)
class Trial:
    """One thing tried: a recipe, on a target if what it made was lowered, whose ``operators`` say how much runs in int8.

    ``size`` in bytes. The float model is the first trial; ``problem`` says why one was not measured.
    """

    recipe: str
    size: int | None = None
    latency: Latency | None = None
    scores: Paired | None = None
    verdict: Verdict | None = None
    outputs: OutputError | None = None
    plan: Plan | None = None
    seconds: float = 0.0
    problem: str | None = None
    target: str | None = None
    operators: str | None = None

    def to_json(self) -> dict[str, Any]:
        scores = None if self.scores is None else self.scores.to_json()
        return {
            "recipe": self.recipe,
            "drop": None if scores is None else scores["drop"],
            "interval": None if scores is None else scores["interval"],
            "latency": None if self.latency is None else self.latency.to_json(),
            "size": self.size,
            "scores": scores,
            "verdict": None if self.verdict is None else asdict(self.verdict),
            "outputs": None if self.outputs is None else self.outputs.to_json(),
            "target": self.target,
            "summary": None if self.plan is None else "\n".join([self.plan.summary(), *filter(None, [self.operators])]),
            "seconds": self.seconds,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Answer:
    """The result of ``autoquantize``.

    ``verdict``: "pass", a quantized model is within the budget and at least 5 % faster or smaller than float; "no_gain", one
    is within it but neither, or no recipe applies; "not_enough_data", none is shown to be within it but more examples may do
    that; "fail", every one loses more.
    ``model``: the fastest quantized model that passed, as it was measured, else the float model itself. ``quantized``: the same
    before it was lowered, which can be saved, exported and lowered again. ``chosen``: its trial.
    """

    verdict: Literal["pass", "fail", "not_enough_data", "no_gain"]
    model: nn.Module
    quantized: nn.Module
    chosen: Trial
    trials: tuple[Trial, ...]
    budget: Budget
    machine: Machine
    measured: Mapping[str, Any]

    def explain(self) -> str:
        """The answer in sentences, and a line a trial."""
        rest = self.trials[0]
        lines = [f"verdict: {self.verdict} (budget: a drop of at most {self.budget.max_drop:g})"]
        for trial in self.trials:
            lines.append(f"  {trial.recipe}: {_describe(trial, rest)}")
        lines.append(_conclusion(self.verdict, self.chosen, rest))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "chosen": self.chosen.recipe,
            "budget": asdict(self.budget),
            "trials": [trial.to_json() for trial in self.trials],
            "explanation": self.explain(),
            "machine": asdict(self.machine),
            "measured": dict(self.measured),
        }

    def save(self, path: str | Path) -> Path:
        """Write the chosen model as a checkpoint with report.json; the float model is not written, only the report is."""
        if self.chosen.recipe != FLOAT:
            return save(self.quantized, path, self.to_json())
        return write_text(Path(path) / REPORT, json.dumps(self.to_json(), indent=1, allow_nan=False)).parent

    def report(self, path: str | Path) -> Path:
        """Write the answer as one self-contained HTML file; returns it."""
        return write_report(self.to_json(), path)


def _describe(trial: Trial, float_trial: Trial) -> str:
    if trial.problem is not None:
        return trial.problem
    assert trial.size is not None and trial.latency is not None
    text = f"{trial.size / 1e6:.2f} MB, {trial.latency.median:.2f} ms"
    if trial.recipe == FLOAT or trial.scores is None or trial.verdict is None:
        score = "" if trial.scores is None else f", score {trial.scores.float_score:.4g}"
        return text + score
    return f"{text}, {_gain(trial, float_trial)}; {trial.verdict.verdict}, {trial.verdict.reason}"


def _gain(trial: Trial, float_trial: Trial) -> str:
    assert trial.size and trial.latency and float_trial.size and float_trial.latency
    smaller = float_trial.size / trial.size
    faster = float_trial.latency.median / trial.latency.median
    speed = f"{faster:.2f}x the speed of float" if faster < 1 else f"{faster:.2f}x faster than float"
    return f"{smaller:.2f}x smaller and {speed}"


def _conclusion(verdict: str, chosen: Trial, float_trial: Trial) -> str:
    if verdict == "pass":
        slower = chosen.latency and float_trial.latency and chosen.latency.median > float_trial.latency.median
        warning = " It is slower than float here: take it for its size." if slower else ""
        return f"{chosen.recipe} is the fastest within the budget: {_gain(chosen, float_trial)}.{warning}"
    if verdict == "no_gain":
        return "Nothing that was tried and is within the budget is faster or smaller than float: keep the float model."
    if verdict == "not_enough_data":
        return (
            "No trial is shown to be within the budget, but more evaluation examples may show it: keep the float model."
        )
    return "Every trial loses more than the budget allows: keep the float model."
