"""How fast are LSTM and GRU?

    python benchmarks/recurrent.py [--quick] [--isa avx2] [--threads 1 2]

One layer, 1024 inputs and units, 100 steps; and two real models with 256 units (grapheme to phoneme, speaker encoder), whose
accuracy ``accuracy.py`` measures. Candidates in turns in one process, medians. ONNX Runtime quantizes LSTM but not GRU: that
stays FP32 there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fewbit
from fewbit.batches import to_call
from fewbit.verify.outputs import main_output
from measure import ISA, example, in_turns, options, write
from peers import UNLIMITED, OnnxModule, int4_dynamic, onnx_dynamic, onnx_export, torch_ao_dynamic

SIZE, STEPS = 1024, 100
SECONDS = 2.0  # a cell


class Outputs(nn.Module):
    """A recurrent layer that returns its outputs only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def candidates(model: nn.Module, example_input: Tensor | None) -> dict[str, nn.Module]:
    """Name to model. ONNX Runtime is left out where there is no ``example_input``."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "torch FP32": lambda: model,
        "torch.ao int8": lambda: torch_ao_dynamic(model),
        "fewbit int8-dynamic": lambda: fewbit.quantize(model, "int8-dynamic"),
        "fewbit int4-dynamic": lambda: fewbit.quantize(model, int4_dynamic()),
    }
    if example_input is not None:
        exported = onnx_export(model, (example_input,), ["x"], ({1: torch.export.Dim.DYNAMIC},))
        makers["ONNX Runtime FP32"] = lambda: OnnxModule(exported)
        if isinstance(model.layer, nn.LSTM):
            makers["ONNX Runtime int8"] = lambda: OnnxModule(onnx_dynamic(exported))
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ImportError as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
    return made


def timed(name: str, batch: int, models: dict[str, nn.Module], inputs: Any, seconds: float) -> list[dict[str, Any]]:
    call = to_call(next(iter(models.values())), inputs, "inputs")
    outputs = {what: main_output(call.run(model))[0].float() for what, model in models.items()}
    times = in_turns({what: [lambda model=model: call.run(model)] for what, model in models.items()}, seconds)
    expected = outputs["torch FP32"]
    return [
        {
            "threads": torch.get_num_threads(),
            "model": name,
            "batch": batch,
            "what": what,
            "isa": UNLIMITED if what.startswith("ONNX") else ISA,
            "ms": 1e3 * time,
            "x FP32": times["torch FP32"] / time,
            "error": float((outputs[what] - expected).norm() / expected.norm()),
        }
        for what, time in times.items()
    ]


@torch.inference_mode()
def main() -> None:
    chosen = options(__doc__)
    size, steps, seconds = (128, 10, 0.05) if chosen.quick else (SIZE, STEPS, SECONDS)
    torch.manual_seed(0)
    results = []
    layers = {f"{kind.__name__} {size}": Outputs(kind(size, size)).eval() for kind in (nn.LSTM, nn.GRU)}
    tasks = {name: example(name) for name in ("g2p_gru", "resemblyzer")}
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for name, layer in layers.items():
            models = candidates(layer, torch.randn(steps, 2, size))
            for batch in (1, 8):
                results += timed(name, batch, models, torch.randn(steps, batch, size), seconds)
        for name, task in tasks.items():
            models = candidates(task.model, None)
            for batch in (1, 8):
                inputs = task.example_inputs
                if isinstance(inputs, Tensor):
                    inputs = inputs[:batch]
                else:
                    inputs = tuple(tensor[:batch] for tensor in inputs)
                results += timed(name, batch, models, inputs, seconds)
    write("recurrent", results, keep=not chosen.quick)


if __name__ == "__main__":
    main()
