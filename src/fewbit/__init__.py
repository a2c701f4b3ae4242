"""fewbit makes a PyTorch model smaller and faster within an accuracy budget, measures that it did, and says why.

qmodel = fewbit.quantize(model, "int8-dynamic")
fewbit.save(qmodel, "out/")
qmodel = fewbit.load("out/", model)
print(fewbit.compare(model, qmodel, batches, evaluate))
answer = fewbit.autoquantize(model, calibration=batches, evaluate=evaluate, budget=fewbit.Budget(max_drop=0.01))
"""

from __future__ import annotations

from fewbit.errors import (
    CalibrationError,
    CheckpointError,
    EvaluationError,
    FewbitError,
    PlanError,
    UnsupportedError,
)
from fewbit.hardware import Machine, probe
from fewbit.pipeline import plan_of, quantize
from fewbit.plan import Plan, Recipe, Rule, load_recipe, make_plan, presets
from fewbit.search import Answer, Trial, autoquantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, Scheme, per_channel, per_group
from fewbit.targets import load, save
from fewbit.task import Task, load_task
from fewbit.verify import Budget, Comparison, Verdict, compare

__version__ = "0.1.0"

__all__ = [
    "PER_TENSOR",
    "PER_TOKEN",
    "Answer",
    "Budget",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "EvaluationError",
    "FewbitError",
    "Granularity",
    "Machine",
    "Plan",
    "PlanError",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Scheme",
    "Task",
    "Trial",
    "UnsupportedError",
    "Verdict",
    "autoquantize",
    "compare",
    "load",
    "load_recipe",
    "load_task",
    "make_plan",
    "per_channel",
    "per_group",
    "plan_of",
    "presets",
    "probe",
    "quantize",
    "save",
]
