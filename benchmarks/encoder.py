"""How fast is a sentence encoder (MiniLM: 6 layers, width 384), and what does its accuracy lose?

    python benchmarks/encoder.py [--quick] [--isa avx2] [--threads 1 2]

One text and sixteen, of 128 tokens each: candidates in turns in one process, medians. Then Spearman on the STS-B development
pairs. The ONNX models are exported by torch.onnx, where GELU and layer norm are operators of their own. The optimizer in
onnxruntime.transformers finds no attention to fuse in such a file, and with it there is no difference.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fewbit
from measure import ISA, example, in_turns, options, write
from peers import (
    UNLIMITED,
    OnnxModule,
    OpenvinoModule,
    int4_dynamic,
    onnx_dynamic,
    onnx_export,
    torch_ao_dynamic,
)

TOKENS = 128
BATCHES = (1, 16)
SECONDS = 3.0  # a cell


def inputs(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (batch, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def makers(model: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """Name to a function that makes the model for torch's current number of threads."""
    batch, tokens = (torch.export.Dim(name) for name in ("batch", "tokens"))
    shapes = {name: {0: batch, 1: tokens} for name in inputs(2)}
    onnx: list[bytes] = []

    def exported() -> bytes:
        if not onnx:
            onnx.append(onnx_export(model, tuple(inputs(2).values()), list(shapes), shapes))
        return onnx[0]

    calibration = [inputs(1)]  # shows the graph, so that every transform applies; the recipes need no ranges
    return {
        "torch FP32": lambda: model,
        "torch.ao int8": lambda: torch_ao_dynamic(model),
        "ONNX Runtime FP32": lambda: OnnxModule(exported()),
        "ONNX Runtime int8": lambda: OnnxModule(onnx_dynamic(exported())),
        "OpenVINO FP32": lambda: OpenvinoModule(exported(), INFERENCE_PRECISION_HINT="f32"),
        "fewbit int8-dynamic": lambda: fewbit.quantize(model, "int8-dynamic", calibration),
        "fewbit int4-dynamic": lambda: fewbit.quantize(model, int4_dynamic(), calibration),
    }


@torch.inference_mode()
def main() -> None:
    chosen = options(__doc__)
    torch.manual_seed(0)
    task = example("minilm")
    assert task.evaluate is not None
    results: list[dict[str, Any]] = []
    scores: dict[str, float] = {}
    make = makers(task.model)
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        models = {}
        for what, maker in make.items():
            try:
                models[what] = maker()
            except ImportError as error:
                print(f"{what}: not measured: {error}", file=sys.stderr)
        for batch in BATCHES[:1] if chosen.quick else BATCHES:
            feed = inputs(batch)
            calls = {what: [functools.partial(model, **feed)] for what, model in models.items()}
            times = in_turns(calls, 0.1 if chosen.quick else SECONDS)
            for what, time in times.items():
                results.append(
                    {
                        "threads": threads,
                        "batch": batch,
                        "what": what,
                        "isa": UNLIMITED if what.startswith(("ONNX", "OpenVINO")) else ISA,
                        "ms": 1e3 * time,
                        "x FP32": times["torch FP32"] / time,
                    }
                )
        if threads == max(chosen.threads) and not chosen.quick:
            for what, model in models.items():
                print(f"{what}: accuracy", file=sys.stderr)
                scores[what] = float(torch.as_tensor(task.evaluate(model)).mean())
        del models
        gc.collect()
    for row in results:
        if scores:
            row["Spearman"] = scores[row["what"]]
            row["drop"] = scores["torch FP32"] - scores[row["what"]]
    write("encoder", results, keep=not chosen.quick)


if __name__ == "__main__":
    main()
