"""The embedded model on its embedded images: quantized within a point, the same from the command line and after loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app

TASK = Path(__file__).parents[2] / "examples" / "fashion_mnist" / "task.py"


@pytest.fixture(scope="module")
def task() -> fewbit.Task:
    return fewbit.load_task(TASK)


def test_the_float_model_is_as_good_as_promised(task: fewbit.Task) -> None:
    assert task.evaluate is not None
    scores = task.evaluate(task.model)
    assert len(scores) == 9000 and float(scores.mean()) >= 0.93


def test_static_int8_keeps_predictions_and_reloads_to_the_bit(task: fewbit.Task, tmp_path: Path) -> None:
    quantized = fewbit.quantize(task.model, "int8-static", task.calibration[:3])
    plan = fewbit.plan_of(quantized)
    assert len(plan.sites) == 14 and len(plan.transforms["fold_batch_norm"]) == 13
    x = task.calibration[5]
    with torch.no_grad():
        agreement = (quantized(x).argmax(1) == task.model(x).argmax(1)).float().mean()
        assert float(agreement) >= 0.97
        loaded = fewbit.load(fewbit.save(quantized, tmp_path), task.model)
        assert torch.equal(loaded(x), quantized(x))


@pytest.mark.slow
def test_the_whole_job_from_the_command_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["auto", str(TASK), "--max-drop", "0.01", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["verdict"] == "pass" and answer["chosen"].startswith("int8-static")
    for trial in answer["trials"]:
        assert {"recipe", "drop", "interval", "latency", "size"} <= trial.keys()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
