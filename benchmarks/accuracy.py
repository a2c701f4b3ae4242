"""How much accuracy each recipe costs on real models and data, peers in the same run.

    python benchmarks/accuracy.py [example ...]      of examples that are not named the rows in the file stay

Peer: torch.ao's dynamic int8 (fbgemm). Convolutional networks: see cnn.py.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
from typing import Any

import torch
from torch import nn

import fewbit
from measure import RESULTS, example, write
from peers import torch_ao_dynamic

FILE = RESULTS / "accuracy.json"

# Example: metric, factor for people, the most that may be lost in its units
EXAMPLES = {
    "minilm": ("Spearman", 1.0, 0.002),
    "g2p_gru": ("word accuracy %", 100.0, 0.3),
    "resemblyzer": ("cosine to FP32", 1.0, 0.001),
}
RECIPES = {"minilm": ("int8-dynamic", "int8-static"), "g2p_gru": ("int8-dynamic",), "resemblyzer": ("int8-dynamic",)}


def score(name: str, task: fewbit.Task, model: nn.Module) -> float:
    """The metric for people."""
    assert task.evaluate is not None
    scores = torch.as_tensor(task.evaluate(model))
    return EXAMPLES[name][1] * float(scores.mean())


def candidates(name: str, task: fewbit.Task) -> dict[str, Any]:
    """What to measure beside float: name to a function that makes the model."""
    made: dict[str, Any] = {
        f"fewbit {recipe}": functools.partial(fewbit.quantize, task.model, recipe, task.calibration)
        for recipe in RECIPES[name]
    }
    return {**made, "torch.ao dynamic": lambda: torch_ao_dynamic(task.model)}


def measure(name: str) -> list[dict[str, Any]]:
    task = example(name)
    metric, _, allowed = EXAMPLES[name]
    float_score = score(name, task, task.model)
    rows: list[dict[str, Any]] = [{"model": name, "metric": metric, "what": "float", "score": float_score}]
    for what, make in candidates(name, task).items():
        began = time.perf_counter()
        try:
            model = make()
        except ImportError as error:
            print(f"{what}: not measured: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - began
        found = score(name, task, model)
        row: dict[str, Any] = {"model": name, "metric": metric, "what": what, "score": found}
        row["drop"] = float_score - found
        row["allowed"] = allowed if what.startswith("fewbit") else None
        row["seconds"] = seconds
        rows.append(row)
        del model
        gc.collect()
    return rows


def main() -> None:
    chosen = sys.argv[1:] or list(EXAMPLES)
    kept = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    rows = []
    for name in EXAMPLES:
        rows += measure(name) if name in chosen else [row for row in kept if row["model"] == name]
    write("accuracy", rows)


if __name__ == "__main__":
    main()
