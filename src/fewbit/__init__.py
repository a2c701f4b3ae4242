"""fewbit makes a PyTorch model smaller and faster within an accuracy budget, measures that it did, and says why.

qmodel = fewbit.quantize(model, "int8-dynamic")
fewbit.save(qmodel, "out/")
qmodel = fewbit.load("out/", model)
print(fewbit.compare(model, qmodel, batches, evaluate))
fast = fewbit.lower(qmodel, example_inputs)  # static int8 on integer kernels; also target="onnxruntime", "openvino"
answer = fewbit.autoquantize(model, calibration=batches, evaluate=evaluate, budget=fewbit.Budget(max_drop=0.01))
"""

from __future__ import annotations

from fewbit.deploy import export, export_folder, lower
from fewbit.distillation import Training, finetune
from fewbit.errors import (
    CalibrationError,
    CheckpointError,
    EvaluationError,
    FewbitError,
    PlanError,
    UnsupportedError,
)
from fewbit.hardware import Machine, probe
from fewbit.huggingface import register_when_imported as _register_when_imported
from fewbit.kvcache import int8_cache
from fewbit.pipeline import plan_of, quantize
from fewbit.plan import Plan, Recipe, Rule, load_recipe, make_plan, presets
from fewbit.search import Answer, Trial, autoquantize, mixed_precision
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, Scheme, per_channel, per_group
from fewbit.streaming import quantize_folder
from fewbit.targets import Lowered, load, save
from fewbit.task import Task, load_task
from fewbit.training import convert, prepare_qat
from fewbit.verify import Budget, Comparison, Verdict, compare

__version__ = "0.1.0"

_register_when_imported()

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
    "Lowered",
    "Machine",
    "Plan",
    "PlanError",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Scheme",
    "Task",
    "Training",
    "Trial",
    "UnsupportedError",
    "Verdict",
    "autoquantize",
    "compare",
    "convert",
    "export",
    "export_folder",
    "finetune",
    "int8_cache",
    "load",
    "load_recipe",
    "load_task",
    "lower",
    "make_plan",
    "mixed_precision",
    "per_channel",
    "per_group",
    "plan_of",
    "prepare_qat",
    "presets",
    "probe",
    "quantize",
    "quantize_folder",
    "save",
]
