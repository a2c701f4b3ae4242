"""What each step of the recipe "int8-static" is worth: the step taken out, or another in its place.

    python benchmarks/ablation.py [example ...]

Models run lowered, on fewbit's integer kernels, additions and all; the first row is int8 as it is mostly done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import fewbit
from fewbit.batches import Call
from fewbit.deploy import integer_reference
from fewbit.targets import TARGETS
from measure import Recorder, example, kl_and_flips, write

EXAMPLES = ("efficientnet_lite0", "resnet20")


def with_scheme(recipe: fewbit.Recipe, method: str | None = None, observer: str | None = None) -> fewbit.Recipe:
    """The recipe with another method or observer for the layers with a static input, and for what is between them."""
    rules = []
    for rule in recipe.rules:
        scheme = rule.scheme
        if scheme is not None and scheme.input is not None and scheme.input.is_static:
            spec = replace(scheme.input, observer=observer or scheme.input.observer)
            scheme = replace(scheme, input=spec, method=method or scheme.method)
        rules.append(replace(rule, scheme=scheme))
    results = recipe.results
    if results is not None and observer is not None:
        results = replace(results, observer=observer)
    return replace(recipe, rules=tuple(rules), results=results)


ROUNDED = "int8-static, sums rounded before additions"


def variants(ends: tuple[str, str]) -> dict[str, fewbit.Recipe]:
    """``ends``: the first and the last layer."""
    preset = fewbit.load_recipe("int8-static")
    plain = replace(preset, correction=None)
    made: dict[str, fewbit.Recipe] = {
        "rounding to nearest, min-max ranges": with_scheme(plain, "rtn", "minmax"),
        "weights by squared error": with_scheme(plain, "mse", "minmax"),
        "and ranges by squared error": with_scheme(plain, "mse"),
        "and pairs of weights bounded": plain,
        "and bias correction": replace(preset, correction="bias"),
        "and affine correction: int8-static": preset,
        "int8-static, ranges by min-max": with_scheme(preset, observer="minmax"),
        "int8-static, ranges by percentile 99.99": with_scheme(preset, observer="percentile_99.99"),
        "int8-static, ranges by output error": with_scheme(preset, observer="output"),
        "int8-static, layers equalized": replace(preset, transforms=(*preset.transforms, "equalize")),
        ROUNDED: preset,
        "int8-static, additions in float": replace(preset, results=None),
        "int8-static, first layer in float": preset.override(ends[0], None),
        "int8-static, last layer in float": preset.override(ends[1], None),
    }
    return made


def measure(name: str) -> list[dict[str, Any]]:
    task = example(name)
    assert task.evaluate is not None
    evaluate: Callable[[Any], Any] = task.evaluate
    original = Recorder(task.model)
    score = float(torch.as_tensor(evaluate(original)).mean())
    layers = [n for n, m in task.model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    rows = []
    for what, recipe in variants((layers[0], layers[-1])).items():
        began = time.perf_counter()
        quantized = fewbit.quantize(task.model, recipe, task.calibration)
        seconds = time.perf_counter() - began
        call = Call((task.example_inputs,), {})
        recorder = Recorder(integer_reference(quantized, call, TARGETS["onnxruntime" if what == ROUNDED else "torch"]))
        found = float(torch.as_tensor(evaluate(recorder)).mean())
        kl, flips = kl_and_flips(torch.cat(original.outputs), torch.cat(recorder.outputs))
        rows.append({"model": name, "what": what, "top-1 %": 100 * found, "drop": 100 * (score - found)})
        rows[-1] |= {"KL": kl, "flips": flips, "images": sum(map(len, recorder.outputs))}
        rows[-1]["seconds"] = seconds
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    rows = []
    for name in sys.argv[1:] or EXAMPLES:
        rows += measure(name)
    write("ablation", rows)


if __name__ == "__main__":
    main()
