"""From a model and a budget to the fastest quantized model within it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from fewbit.batches import Call, evaluating, to_call
from fewbit.deploy import check_target, installed, lower
from fewbit.errors import CalibrationError, EvaluationError, FewbitError, PlanError, UnsupportedError
from fewbit.hardware import probe
from fewbit.lowering import is_integer
from fewbit.pipeline import plan_of, quantize, sites_of
from fewbit.plan import Recipe, load_recipe
from fewbit.progress import progress
from fewbit.search.answer import FLOAT, Answer, Trial
from fewbit.targets import tensor_bytes
from fewbit.verify import Budget, OutputError, judge, latencies, output_error, paired, scores_of

GAIN = 0.05  # less time or size saved than this share is no reason to quantize
RECIPES = ("int8-dynamic", "int8-static", "int4-dynamic", "int4-weight-only")


def autoquantize(
    model: nn.Module,
    *,
    calibration: Any = None,
    evaluate: Callable[[nn.Module], Any],
    budget: Budget,
    example_inputs: Any = None,
    time_limit: float | None = None,
    recipes: Iterable[str | Recipe] = RECIPES,
    targets: Iterable[str] | None = None,
) -> Answer:
    """Try ``recipes``, measure accuracy, latency and size of each beside the float model, and choose.

    What a static recipe made is measured as each of ``targets`` runs it (see ``lower``; default: "torch" and every engine that
    is installed), or in plain PyTorch if none of them takes it.

    ``calibration``: batches, see ``quantize``; without them recipes that need them are not tried. ``evaluate(model)``:
    1-D per-example scores, higher is better, or one float. ``example_inputs``: the batch whose latency counts (default: the
    first calibration batch). ``time_limit`` in seconds: no further trial is begun after it. ``model`` is not changed.

    Raises EvaluationError for unusable scores, CalibrationError for data that do not fit, PlanError for an unknown recipe.
    """
    start = time.monotonic()
    chosen_recipes = [load_recipe(recipe) for recipe in recipes]
    engines = installed() if targets is None else [check_target(target) for target in targets]
    names = [FLOAT, *(recipe.name for recipe in chosen_recipes)]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(
                f"recipes: {name!r} is the name of two; give each its own: dataclasses.replace(recipe, name=...)."
            )
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    if example_inputs is None:
        if calibration is None:
            raise CalibrationError("autoquantize needs example_inputs, or calibration batches to take the first of.")
        example_inputs = next(iter(calibration), None)
        if example_inputs is None:
            raise CalibrationError("calibration: found no batch; 100 to 1000 samples are usual.")
    call = to_call(model, example_inputs, "example_inputs")
    with evaluating(model):
        float_scores = scores_of(evaluate, model, FLOAT)
        models: dict[str, nn.Module] = {FLOAT: model}
        sources: dict[str, nn.Module] = {FLOAT: model}
        trials = [Trial(FLOAT, size=tensor_bytes(model), scores=paired(float_scores, float_scores))]
        for recipe in progress(chosen_recipes, "trying recipes"):
            began = time.monotonic()
            if time_limit is not None and began - start > time_limit:
                trials.append(Trial(recipe.name, problem=f"not tried: the time limit of {time_limit:g} s was over"))
                continue
            trial, quantized = _try(model, recipe, calibration)
            if quantized is None:
                trials.append(trial)
                continue
            began, quantizing = time.monotonic(), time.monotonic() - began
            for variant, candidate in _lowered(trial, quantized, example_inputs, engines):
                trial = variant
                try:
                    if candidate is not None:
                        scores = paired(float_scores, scores_of(evaluate, candidate, trial.recipe))
                        outputs = _output_error(model, candidate, call)
                        seconds = quantizing + time.monotonic() - began
                        trial = replace(trial, scores=scores, outputs=outputs, seconds=seconds)
                        models[trial.recipe], sources[trial.recipe] = candidate, quantized
                except EvaluationError as error:
                    if trial.target is None or not isinstance(error.__cause__, CalibrationError):
                        raise
                    trial = replace(trial, problem=f"not measured: {error.__cause__}")
                trials.append(trial)
                began = time.monotonic()
        timed = latencies(models, call)
    count = len(models) - 1
    judged = []
    for trial in trials:
        tried = trial.recipe in timed and trial.recipe != FLOAT and trial.scores is not None
        within = judge(trial.scores, budget, count) if tried and trial.scores is not None else None
        judged.append(replace(trial, latency=timed.get(trial.recipe), verdict=within))
    verdict, best = _choose(judged)
    return Answer(
        verdict=verdict,
        model=models[best.recipe],
        quantized=sources[best.recipe],
        chosen=best,
        trials=tuple(judged),
        budget=budget,
        machine=probe(),
        measured={"seconds": time.monotonic() - start, "torch": torch.__version__, "trials": count},
    )


def _try(model: nn.Module, recipe: Recipe, calibration: Any) -> tuple[Trial, nn.Module | None]:
    if recipe.needs_calibration and calibration is None:
        return Trial(recipe.name, problem="not tried: it needs calibration batches"), None
    try:
        candidate = quantize(model, recipe, calibration)
    except PlanError as error:  # nothing in this model for this recipe
        return Trial(recipe.name, problem=str(error)), None
    except FewbitError as error:
        raise type(error)(f"recipe {recipe.name!r}: {error}") from error
    plan = plan_of(candidate)
    if plan.share < GAIN:
        return Trial(recipe.name, problem=f"not tried: it reaches only {100 * plan.share:.1f} % of the weights"), None
    return Trial(recipe.name, size=tensor_bytes(candidate), plan=plan), candidate


def _lowered(
    trial: Trial, quantized: nn.Module, example_inputs: Any, targets: list[str]
) -> list[tuple[Trial, nn.Module | None]]:
    """The quantized model as each target runs it, with what it is to be measured as."""
    if not any(is_integer(layer) for _, layer in sites_of(quantized)):
        return [(trial, quantized)]
    found: list[tuple[Trial, nn.Module | None]] = []
    for target in targets:
        own = replace(trial, recipe=f"{trial.recipe} on {target}", target=target)
        try:
            lowered = lower(quantized, example_inputs, target)
            found.append((replace(own, operators=lowered.summary()), lowered))
        except UnsupportedError as error:
            found.append((replace(own, size=None, problem=f"not tried: {error}"), None))
    return found if any(lowered is not None for _, lowered in found) else [*found, (trial, quantized)]


def _output_error(model: nn.Module, candidate: nn.Module, call: Call) -> OutputError | None:
    try:
        return output_error(model, candidate, [call])
    except UnsupportedError:  # no tensor to compare: the scores say it all
        return None


def _choose(trials: list[Trial]) -> tuple[Literal["pass", "fail", "not_enough_data", "no_gain"], Trial]:
    """The verdict, and the trial whose model is the answer."""
    float_trial, tried = trials[0], [trial for trial in trials[1:] if trial.verdict is not None]
    passed = [trial for trial in tried if trial.verdict is not None and trial.verdict.verdict == "pass"]
    gaining = [trial for trial in passed if _faster(trial, float_trial) or _smaller(trial, float_trial)]
    if gaining:
        return "pass", min(gaining, key=_milliseconds)
    if passed or not tried:
        return "no_gain", float_trial
    undecided = any(trial.verdict is not None and trial.verdict.verdict == "not_enough_data" for trial in tried)
    return ("not_enough_data" if undecided else "fail"), float_trial


def _milliseconds(trial: Trial) -> float:
    assert trial.latency is not None
    return trial.latency.median


def _faster(trial: Trial, float_trial: Trial) -> bool:
    return _milliseconds(trial) < (1 - GAIN) * _milliseconds(float_trial)


def _smaller(trial: Trial, float_trial: Trial) -> bool:
    assert trial.size is not None and float_trial.size is not None
    return trial.size < (1 - GAIN) * float_trial.size
