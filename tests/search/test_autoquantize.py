"""autoquantize: verdicts, trials, and the answer's forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import (
    Answer,
    Budget,
    CalibrationError,
    EvaluationError,
    PlanError,
    QuantSpec,
    Recipe,
    Rule,
    Scheme,
    autoquantize,
    per_channel,
)
from fewbit.nn import QuantizedLayer
from fewbit.search import Trial
from fewbit.search.autoquantize import _choose
from fewbit.verify import Latency, Verdict

STATIC, DYNAMIC, INT4_DYNAMIC, INT4 = "int8-static on torch", "int8-dynamic", "int4-dynamic", "int4-weight-only"


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, (QuantizedLayer, fewbit.Lowered)) for module in model.modules())


def scoring(drop: float, count: int = 400, spread: float = 0.01) -> Callable[[nn.Module], Tensor]:
    """Scores of which quantized models lose ``drop``."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(count, generator=generator)
    noise = spread * torch.randn(count, generator=generator)
    return lambda model: scores - drop - noise if is_quantized(model) else scores


def answer_of(model: nn.Module, vectors: list[Tensor], evaluate: Any, max_drop: float = 0.01, **more: Any) -> Answer:
    more = {"targets": ["torch"], **more}
    return autoquantize(model, calibration=vectors, evaluate=evaluate, budget=Budget(max_drop), **more)


@pytest.fixture
def passed(mlp: nn.Module, vectors: list[Tensor]) -> Answer:
    return answer_of(mlp, vectors, scoring(0.0))


def test_pass(passed: Answer, mlp: nn.Module, vectors: list[Tensor]) -> None:
    assert passed.verdict == "pass" and is_quantized(passed.model)
    assert [trial.recipe for trial in passed.trials] == ["float", DYNAMIC, STATIC, INT4_DYNAMIC, INT4]
    assert fewbit.plan_of(passed.quantized).recipe.name == passed.chosen.recipe.split(" on ")[0]
    assert "within the budget" in passed.explain()
    for trial in passed.trials[1:]:
        assert trial.verdict is not None and trial.verdict.verdict == "pass" and trial.problem is None
        assert trial.size is not None and passed.trials[0].size is not None and trial.size < passed.trials[0].size
        assert trial.latency is not None and trial.outputs is not None and trial.outputs.sqnr > 15
        assert trial.scores is not None and trial.scores.drop == pytest.approx(0.0, abs=0.002)


def test_fail(mlp: nn.Module, vectors: list[Tensor]) -> None:
    answer = answer_of(mlp, vectors, scoring(0.2))
    assert answer.verdict == "fail" and answer.model is mlp and answer.chosen is answer.trials[0]
    assert "Every trial loses more" in answer.explain()


def test_not_enough_data(mlp: nn.Module, vectors: list[Tensor]) -> None:
    answer = answer_of(mlp, vectors, scoring(0.0, count=6, spread=0.2))
    assert answer.verdict == "not_enough_data" and answer.model is mlp
    verdicts = [trial.verdict for trial in answer.trials[1:]]
    assert all(verdict is not None and verdict.verdict == "not_enough_data" for verdict in verdicts)
    assert "more evaluation examples" in answer.explain()


def test_one_number_is_judged_without_chance(mlp: nn.Module, vectors: list[Tensor]) -> None:
    answer = answer_of(mlp, vectors, lambda model: 0.895 if is_quantized(model) else 0.9)
    assert answer.verdict == "pass" and answer.chosen.scores is not None
    assert answer.chosen.scores.interval() is None and "chance is not accounted for" in answer.explain()


def test_only_the_recipe_within_the_budget_is_chosen(mlp: nn.Module, vectors: list[Tensor]) -> None:
    def evaluate(model: nn.Module) -> float:
        other = isinstance(model, fewbit.Lowered) or (is_quantized(model) and fewbit.plan_of(model).recipe.name != INT4)
        return 0.5 if other else 0.9

    answer = answer_of(mlp, vectors, evaluate)
    assert answer.verdict == "pass" and answer.chosen.recipe == INT4


def test_static_is_not_tried_without_calibration(mlp: nn.Module, vectors: list[Tensor]) -> None:
    answer = autoquantize(mlp, evaluate=lambda _: 0.5, budget=Budget(0.1), example_inputs=vectors[0])
    problems = {trial.recipe: trial.problem for trial in answer.trials}
    assert problems["int8-static"] == "not tried: it needs calibration batches"
    assert problems[DYNAMIC] is None and problems[INT4] is None and answer.verdict == "pass"
    assert "not tried: it needs calibration batches" in answer.explain()


def test_no_time_means_no_trials(mlp: nn.Module, vectors: list[Tensor]) -> None:
    answer = answer_of(mlp, vectors, scoring(0.0), time_limit=0)
    assert all(trial.problem is not None and "time limit of 0 s" in trial.problem for trial in answer.trials[1:])
    assert len(answer.trials) == 5 and answer.model is mlp and answer.chosen.recipe == "float"
    assert answer.verdict != "pass"


def test_recipes_without_anything_to_do_say_so(vectors: list[Tensor]) -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(256, 3)).eval()
    answer = answer_of(small, vectors, scoring(0.0))
    problems = {trial.recipe: trial.problem for trial in answer.trials}
    assert "too small to gain" in str(problems[DYNAMIC]) and "too small to gain" in str(problems[INT4])
    assert problems[STATIC] is None


def test_own_recipes(mlp: nn.Module, vectors: list[Tensor]) -> None:
    mine = Recipe("mine", (Rule("0", Scheme(QuantSpec("int8", per_channel(0)))),))
    answer = answer_of(mlp, vectors, scoring(0.0), recipes=[mine, DYNAMIC])
    assert [trial.recipe for trial in answer.trials] == ["float", "mine", DYNAMIC]


def test_a_generator_of_batches_serves_all_recipes(mlp: nn.Module, vectors: list[Tensor]) -> None:
    answer = autoquantize(mlp, calibration=iter(vectors), evaluate=scoring(0.0), budget=Budget(0.01), targets=["torch"])
    assert all(trial.problem is None for trial in answer.trials)


def test_float_model_is_unchanged(mlp: nn.Module, vectors: list[Tensor]) -> None:
    mlp.train()
    mlp[1].eval()
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    modes = [module.training for module in mlp.modules()]
    answer_of(mlp, vectors, scoring(0.0))
    assert [module.training for module in mlp.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
    assert all(set(module.__dict__) == set(type(module)(1, 1).__dict__) for module in mlp if type(module) is nn.Linear)


def test_evaluate_sees_models_in_eval_mode(mlp: nn.Module, vectors: list[Tensor]) -> None:
    modes = []

    def evaluate(model: nn.Module) -> float:
        modes.append(any(module.training for module in model.modules()))
        return 0.5

    answer_of(mlp.train(), vectors, evaluate, recipes=[DYNAMIC])
    assert modes == [False, False] and mlp.training


def test_json(passed: Answer) -> None:
    data = json.loads(json.dumps(passed.to_json()))
    assert {"verdict", "chosen", "budget", "trials", "explanation", "machine", "measured"} <= set(data)
    assert data["verdict"] == "pass" and data["budget"] == {"max_drop": 0.01, "confidence": 0.95}
    assert data["explanation"] == passed.explain() and data["measured"]["trials"] == 4
    for trial in data["trials"]:
        assert {"recipe", "drop", "interval", "latency", "size"} <= set(trial)
        assert trial["latency"]["median"] > 0 and trial["size"] > 0
    for trial in data["trials"][1:]:
        low, high = trial["interval"]
        assert low <= trial["drop"] <= high


def test_save_of_a_pass_is_a_checkpoint(passed: Answer, mlp: nn.Module, vectors: list[Tensor], tmp_path: Path) -> None:
    folder = passed.save(tmp_path / "out")
    loaded = fewbit.load(folder, mlp)
    with torch.no_grad():
        assert torch.equal(loaded(vectors[0]), passed.quantized(vectors[0]))
    assert json.loads((folder / "report.json").read_text())["verdict"] == "pass"


def test_save_of_a_fail_is_a_report_alone(mlp: nn.Module, vectors: list[Tensor], tmp_path: Path) -> None:
    folder = answer_of(mlp, vectors, scoring(0.2), recipes=[DYNAMIC]).save(tmp_path / "deep" / "out")
    assert [file.name for file in folder.iterdir()] == ["report.json"]


def test_report(passed: Answer, tmp_path: Path) -> None:
    text = passed.report(tmp_path / "report.html").read_text()
    assert all(name in text for name in ("<!doctype html>", "float", DYNAMIC, STATIC, INT4))


def test_mistakes_are_named(mlp: nn.Module, vectors: list[Tensor]) -> None:
    with pytest.raises(PlanError, match="Did you mean 'int8-dynamic'"):
        answer_of(mlp, vectors, scoring(0.0), recipes=["int8-dynamik"])
    with pytest.raises(CalibrationError, match="needs example_inputs"):
        autoquantize(mlp, evaluate=scoring(0.0), budget=Budget(0.1))
    with pytest.raises(CalibrationError, match="no batch"):
        answer_of(mlp, [], scoring(0.0))
    with pytest.raises(EvaluationError, match=r"evaluate\(float\) returned a str"):
        answer_of(mlp, vectors, lambda _: "good")
    with pytest.raises(EvaluationError, match=r"\[3\] scores for the float model and \[2\]"):
        answer_of(mlp, vectors, lambda model: torch.ones(2 if is_quantized(model) else 3))
    with pytest.raises(EvaluationError, match=r"evaluate\(int8-dynamic\) returned 1 NaN"):
        answer_of(mlp, vectors, lambda model: torch.nan if is_quantized(model) else 1.0)
    with pytest.raises(CalibrationError, match="recipe 'int8-static': calibration batch 1"):
        answer_of(mlp, [vectors[0], torch.randn(2, 3)], scoring(0.0), recipes=["int8-static"])


def trial(name: str, milliseconds: float, size: int, verdict: Any = "pass") -> Trial:
    latency = Latency(milliseconds, milliseconds, milliseconds, 5, 1)
    return Trial(name, size=size, latency=latency, verdict=None if verdict is None else Verdict(verdict, ""))


@pytest.mark.parametrize(
    ("tried", "verdict", "chosen"),
    [
        ([trial("a", 5, 50), trial("b", 4, 60)], "pass", "b"),
        ([trial("a", 5, 50), trial("b", 4, 60, "fail")], "pass", "a"),
        ([trial("a", 12, 50)], "pass", "a"),
        ([trial("a", 12, 100)], "no_gain", "float"),
        ([trial("a", 12, 100), trial("b", 1, 1, "fail")], "no_gain", "float"),
        ([trial("a", 1, 1, "fail"), trial("b", 1, 1, "not_enough_data")], "not_enough_data", "float"),
        ([trial("a", 1, 1, "fail")], "fail", "float"),
    ],
    ids=["fastest", "within", "smaller-alone", "no-gain", "no-gain-fail", "open", "fail"],
)
def test_choice(tried: list[Trial], verdict: str, chosen: str) -> None:
    found, best = _choose([trial("float", 10, 100, None), *tried])
    assert (found, best.recipe) == (verdict, chosen)
