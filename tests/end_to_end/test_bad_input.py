"""What goes wrong in practice ends in one of fewbit's errors, whose message says what to do."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import (
    Budget,
    CalibrationError,
    CheckpointError,
    EvaluationError,
    FewbitError,
    PlanError,
    UnsupportedError,
)


def test_all_errors_are_of_one_tree() -> None:
    for error in (CalibrationError, CheckpointError, EvaluationError, PlanError, UnsupportedError):
        assert issubclass(error, FewbitError)


@pytest.mark.parametrize("recipe", fewbit.presets())
def test_model_without_anything_to_quantize(recipe: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(4))
    with pytest.raises(PlanError, match=f"recipe '{recipe}' quantizes nothing in this Sequential: it has no layer"):
        fewbit.quantize(model, recipe, [torch.randn(2, 4)])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "'int8-static' fixes input ranges: it needs calibration batches"),
        ([], "calibration: found no batch; 100 to 1000 samples are usual"),
        (iter(()), "calibration: found no batch"),
        (torch.randn(4, 3, 8, 8), "calibration: found one Tensor, needs an iterable of batches"),
        ({"x": torch.randn(4, 3, 8, 8)}, "calibration: found one dict, needs an iterable of batches"),
        (3, "calibration: found one int"),
        (["text"], "calibration batch 0: found a str, needs a tensor, a tuple or a dict"),
        ([torch.randn(4, 1, 8, 8)], r"calibration batch 0: ConvNet raised RuntimeError on 0: float32 \[4, 1, 8, 8\]"),
        ([torch.randn(4, 192)], r"calibration batch 0: ConvNet raised"),
        ([torch.tensor([0, 1, 2])], "A one-dimensional integer tensor looks like labels"),
        ([{"image": torch.randn(4, 3, 8, 8)}], r"calibration batch 0: found image: .*; ConvNet.forward takes \(x"),
        ([torch.full((4, 3, 8, 8), torch.nan)], "calibration batch 0: the input of 'conv1' has a NaN"),
        ([torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), torch.inf)], "calibration batch 1: the input of 'conv1'"),
    ],
    ids=[
        "none",
        "empty",
        "empty-iterator",
        "bare-tensor",
        "bare-mapping",
        "number",
        "text",
        "wrong-channels",
        "wrong-axes",
        "labels",
        "wrong-name",
        "nan",
        "infinite-second-batch",
    ],
)
def test_calibration(cnn: nn.Module, calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fewbit.quantize(cnn, "int8-static", calibration)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int4-weight-only"])
def test_weights_that_are_not_finite_name_their_layer(mlp: nn.Module, recipe: str, value: float) -> None:
    with torch.no_grad():
        mlp.get_parameter("2.weight")[3, 5] = value
    with pytest.raises(PlanError, match=r"2.weight: cannot be quantized: found 1 NaN or infinite of 49152 values"):
        fewbit.quantize(mlp, recipe)
    plan = fewbit.plan_of(fewbit.quantize(mlp, recipe, exclude=["2"]))
    assert "0" in plan.sites and "2" not in plan.sites


def good(_: nn.Module) -> Tensor:
    return torch.ones(8)


def raising(_: nn.Module) -> Tensor:
    raise RuntimeError("no such split")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda _: math.nan, r"evaluate\(float\) returned 1 NaN or infinite of 1 scores"),
        (lambda _: torch.tensor([1.0, math.nan]), r"evaluate\(float\) returned 1 NaN or infinite of 2 scores"),
        (lambda _: "0.93", r"evaluate\(float\) returned a str; it must return a 1-D tensor"),
        (lambda _: None, r"evaluate\(float\) returned a NoneType"),
        (lambda _: torch.ones(2, 3), r"evaluate\(float\) returned a tensor of shape \[2, 3\]"),
        (lambda _: [], r"evaluate\(float\) returned a tensor of shape \[0\]"),
        (raising, r"evaluate\(float\) raised RuntimeError: no such split"),
        (
            lambda model: torch.ones(3 if isinstance(model[0], nn.Linear) else 2),
            r"\[3\] scores for the float model and \[2\] for the quantized one; it must score the same examples",
        ),
    ],
    ids=["nan", "nan-in-scores", "text", "none", "matrix", "empty", "raising", "other-length"],
)
def test_evaluate(mlp: nn.Module, vectors: list[Tensor], evaluate: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        fewbit.autoquantize(mlp, calibration=vectors, evaluate=evaluate, budget=Budget(0.1), recipes=["int8-dynamic"])
    with pytest.raises(EvaluationError, match=message):
        fewbit.compare(mlp, fewbit.quantize(mlp, "int8-dynamic"), vectors, evaluate)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("int8-dinamic", "int8-dynamic"), ("int8_static", "int8-static"), ("int4-weights-only", "int4-weight-only")],
)
def test_unknown_recipe(mlp: nn.Module, name: str, hint: str) -> None:
    with pytest.raises(PlanError, match=f"unknown recipe '{name}'. Did you mean '{hint}'"):
        fewbit.quantize(mlp, name)


def test_exclude_of_nothing(mlp: nn.Module) -> None:
    with pytest.raises(
        PlanError, match=r"a rule matches nothing: unknown pattern 'type:Linea'. Did you mean 'type:Linear'"
    ):
        fewbit.quantize(mlp, "int8-dynamic", exclude=["type:Linea"])


def test_folder_that_cannot_be_written(mlp: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Give a folder that you may write to"):
        fewbit.save(fewbit.quantize(mlp, "int8-dynamic"), tmp_path / "file" / "out")


def test_model_that_cannot_be_copied(mlp: nn.Module) -> None:
    mlp.lock = threading.Lock()
    with pytest.raises(UnsupportedError, match=r"Sequential cannot be copied \(copy.deepcopy\): cannot pickle"):
        fewbit.quantize(mlp, "int8-dynamic")


def test_model_that_raises_on_calibration(mlp: nn.Module, vectors: list[Tensor]) -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(256, 256)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("token_type_ids")

    with pytest.raises(CalibrationError, match=r"calibration batch 0: Checking raised KeyError .*'token_type_ids'"):
        fewbit.quantize(Checking(), "int8-static", vectors)


def test_float_model_where_a_quantized_one_is_needed(mlp: nn.Module, vectors: list[Tensor], tmp_path: Path) -> None:
    for use in (
        lambda: fewbit.save(mlp, tmp_path),
        lambda: fewbit.plan_of(mlp),
        lambda: fewbit.compare(mlp, mlp, vectors),
    ):
        with pytest.raises(PlanError, match="this Sequential was not quantized by fewbit"):
            use()
