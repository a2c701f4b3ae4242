"""How much accuracy each recipe costs on real models and data, peers in the same run.

    python benchmarks/accuracy.py [example ...]

Peers: torch.ao's dynamic int8 (fbgemm) and ONNX Runtime's static int8 (per channel, min-max, its own QDQ files).
"""

from __future__ import annotations

import functools
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbit
from measure import Recorder, example, kl_and_flips, write
from peers import CNN, torch_ao_dynamic

# Example: metric, factor for people, the most that may be lost in its units
EXAMPLES = {
    "minilm": ("Spearman", 1.0, 0.002),
    "g2p_gru": ("word accuracy %", 100.0, 0.3),
    "resemblyzer": ("cosine to FP32", 1.0, 0.001),
    "efficientnet_lite0": ("top-1 %", 100.0, 1.0),
    "resnet20": ("top-1 %", 100.0, 0.3),
    "smollm2": ("perplexity", 1.0, None),
}
RECIPES = {
    "minilm": "int8-dynamic",
    "g2p_gru": "int8-dynamic",
    "resemblyzer": "int8-dynamic",
    "efficientnet_lite0": "int8-static",
    "resnet20": "int8-static",
}


def score(name: str, task: fewbit.Task, model: nn.Module) -> tuple[float, Tensor | None]:
    """The metric for people, and the logits of classifiers."""
    recorder = Recorder(model)
    assert task.evaluate is not None
    scores = torch.as_tensor(task.evaluate(recorder if name in ("efficientnet_lite0", "resnet20") else model))
    if name == "smollm2":
        return float(torch.exp(-scores.mean())), None
    logits = torch.cat(recorder.outputs) if recorder.outputs else None
    return EXAMPLES[name][1] * float(scores.mean()), logits


def candidates(name: str, task: fewbit.Task) -> dict[str, Any]:
    """What to measure beside float: name to a function that makes the model."""
    if name == "smollm2":
        recipe = fewbit.load_recipe("int4-weight-only")
        plain = fewbit.Recipe(
            "rtn",
            tuple(
                fewbit.Rule(rule.pattern, fewbit.Scheme(rule.scheme.weight), rule.min_weights, rule.optional)
                for rule in recipe.rules
                if rule.scheme is not None
            ),
        )
        return {
            "fewbit int4 g32 rtn": lambda: fewbit.quantize(task.model, plain),
            "fewbit int4 g32 mse": lambda: fewbit.quantize(task.model, recipe),
            "fewbit int4 g32 mse, calibrated": lambda: fewbit.quantize(task.model, recipe, task.calibration),
        }
    recipe = RECIPES[name]
    made: dict[str, Any] = {f"fewbit {recipe}": lambda: fewbit.quantize(task.model, recipe, task.calibration)}
    if recipe == "int8-dynamic":
        made["torch.ao dynamic"] = lambda: torch_ao_dynamic(task.model)
    else:
        for what in ("ONNX Runtime static", "ONNX Runtime static, reduce_range"):
            made[what] = functools.partial(static_peer, what, task)
    return made


def static_peer(what: str, task: fewbit.Task) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        return CNN[what](task.model, task.calibration, task.calibration[0], Path(folder))


def measure(name: str) -> list[dict[str, Any]]:
    task = example(name)
    metric, _, allowed = EXAMPLES[name]
    float_score, float_logits = score(name, task, task.model)
    rows: list[dict[str, Any]] = [{"model": name, "metric": metric, "what": "float", "score": float_score}]
    for what, make in candidates(name, task).items():
        began = time.perf_counter()
        try:
            model = make()
        except ImportError as error:
            print(f"{what}: not measured: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - began
        found, logits = score(name, task, model)
        row: dict[str, Any] = {"model": name, "metric": metric, "what": what, "score": found}
        row["drop"] = (found - float_score) if name == "smollm2" else (float_score - found)
        row["allowed"] = allowed if what.startswith("fewbit") else None
        if logits is not None and float_logits is not None:
            row["KL"], row["flips"] = kl_and_flips(float_logits, logits)
            row["images"] = len(logits)
        row["seconds"] = seconds
        rows.append(row)
        del model
        gc.collect()
    return rows


def main() -> None:
    rows = []
    for name in sys.argv[1:] or EXAMPLES:
        rows += measure(name)
    write("accuracy", rows)


if __name__ == "__main__":
    main()
