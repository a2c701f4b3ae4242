"""Which layers lose what: each quantized layer against its float one on the float model's own inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, run
from fewbit.nn import QuantizedLayer
from fewbit.pipeline import float_twin, plan_of, sites_of
from fewbit.verify.outputs import Noise, finite, main_output


@dataclass(frozen=True)
class LayerError:
    """SQNR of one layer's output in dB: as quantized, with quantized weights alone, with quantized input alone.

    ``input_only`` is None where the input stays float or is quantized inside (recurrent layers).
    """

    name: str
    type: str
    sqnr: float
    weight_only: float
    input_only: float | None

    def to_json(self) -> dict[str, Any]:
        figures = {key: finite(getattr(self, key)) for key in ("sqnr", "weight_only", "input_only")}
        return {"name": self.name, "type": self.type, **figures}


def layer_errors(model: nn.Module, quantized: nn.Module, batches: Iterable[Call]) -> list[LayerError]:
    """One entry a site that the batches reach, worst first."""
    plan = plan_of(quantized)
    twin = float_twin(model, plan)
    noises: dict[str, tuple[Noise, Noise, Noise]] = {}

    def watch(name: str, layer: QuantizedLayer) -> Any:
        twin_layer = layer.weight_only()
        inner_input = not layer.accepts_static_input

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            both, weights, inputs = noises.setdefault(name, (Noise(), Noise(), Noise()))
            exact = main_output(output)[0]
            both.add(exact, main_output(layer.forward(*args, **kwargs))[0])
            weights.add(exact, main_output(twin_layer.forward(*args, **kwargs))[0])
            if layer.scheme.input is not None and not inner_input and args and isinstance(args[0], Tensor):
                rounded = layer.quantized_input(args[0])
                # forward, not the call: no hook of this one.
                inputs.add(exact, main_output(module.forward(rounded, *args[1:], **kwargs))[0])

        return hook

    handles = [
        twin.get_submodule(name).register_forward_hook(watch(name, layer), with_kwargs=True)
        for name, layer in sites_of(quantized)
    ]
    try:
        with torch.no_grad():
            for number, call in enumerate(batches):
                run(twin, call, f"batch {number}")
    finally:
        for handle in handles:
            handle.remove()
    errors = [
        LayerError(
            name,
            plan.sites[name].type,
            both.sqnr,
            weights.sqnr,
            inputs.sqnr if inputs.signal else None,
        )
        for name, (both, weights, inputs) in noises.items()
    ]
    return sorted(errors, key=lambda error: error.sqnr)
