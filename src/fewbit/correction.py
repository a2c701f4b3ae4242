"""What quantization shifts and shrinks on average, given back: sequential affine correction of layers.

Layer by layer in the order of execution, the quantized layer's result z on what the layers before it (already corrected) make
of the data is fitted to the float layer's result y, channel by channel:

    y ~ alpha z + beta,   alpha = (cov(y, z) + tau) / (var(z) + tau),   beta = mean(y) - alpha mean(z)

with tau a hundredth of the mean variance and alpha within [0.9, 1.1]. alpha becomes part of the weight's scales and beta of
the bias: it costs nothing when the model runs. alpha = 1 is bias correction (Nagel et al., https://arxiv.org/abs/1906.04721).

Both models run side by side on a few examples at a time; sums are kept from the first to the last, so that later examples
refine what the earlier ones said. What is in memory is one chunk's results of all layers, CHUNK_BYTES at most if one example
has no more.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, chunks, run
from fewbit.calibration import Grid
from fewbit.errors import CalibrationError
from fewbit.nn import layer_class
from fewbit.plan import Plan
from fewbit.progress import progress
from fewbit.qtensor import QTensor, dequantize, fake_quantize

CHUNK_BYTES = 256 << 20
EXAMPLES = 300  # no more are looked at
CHANGE = 0.1  # of alpha, at most


@dataclass
class _Fit:
    """Running moments of a channel's float results y and quantized results z."""

    count: int = 0
    mean_y: Tensor | float = 0.0
    mean_z: Tensor | float = 0.0
    covariance: Tensor | float = 0.0  # sums of products of deviations
    variance: Tensor | float = 0.0

    def update(self, y: Tensor, z: Tensor) -> None:
        """``y`` and ``z`` ``[channels, values]``."""
        count = y.shape[1]
        mean_y, mean_z = y.mean(1, keepdim=True), z.mean(1, keepdim=True)
        y, z = y - mean_y, z - mean_z
        covariance = (y * z).sum(1).double()
        variance = z.square_().sum(1).double()
        total = self.count + count
        step_y, step_z = mean_y.squeeze(1).double() - self.mean_y, mean_z.squeeze(1).double() - self.mean_z
        weight = self.count * count / total
        self.covariance = self.covariance + covariance + step_y * step_z * weight
        self.variance = self.variance + variance + step_z.square() * weight
        self.mean_y = self.mean_y + step_y * (count / total)
        self.mean_z = self.mean_z + step_z * (count / total)
        self.count = total

    def solve(self, kind: str) -> tuple[Tensor, Tensor]:
        """alpha and beta, float64 ``[channels]``."""
        assert isinstance(self.mean_y, Tensor) and isinstance(self.mean_z, Tensor) and isinstance(self.variance, Tensor)
        alpha = torch.ones_like(self.mean_y)
        if kind == "affine":
            tau = 1e-2 * self.variance.mean() + 1e-30
            alpha = ((self.covariance + tau) / (self.variance + tau)).clamp(1 - CHANGE, 1 + CHANGE)
        return alpha, self.mean_y - alpha * self.mean_z


def correct(
    twin: nn.Module,
    plan: Plan,
    weights: Mapping[str, Mapping[str, QTensor]],
    grids: Mapping[str, Grid | None],
    batches: Iterable[Call],
    kind: str,
) -> tuple[dict[str, dict[str, QTensor]], dict[str, Tensor]]:
    """The weights with their scales corrected, and the new biases of the layers that have one.

    ``twin`` is the float twin of the plan. Corrected are layers with a static input, a bias and a weight of their own.
    """
    names = [name for name in plan.sites if _is_correctable(name, twin, plan, weights, grids)]
    fits = {name: _Fit() for name in names}
    solved: dict[str, tuple[Tensor, Tensor]] = {}
    recorded: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            recorded[name].append(y.clone())  # what follows may write to it

        return hook

    def fit(name: str) -> Any:
        bias = twin.get_submodule(name).bias
        axis = _channel_axis(twin.get_submodule(name))
        assert isinstance(bias, Tensor)

        def hook(module: nn.Module, args: Any, z: Tensor) -> Tensor:
            y = recorded[name].pop(0) if recorded[name] else None
            # The data may take another way here than through the float model.
            if y is None or y.shape != z.shape or not z.numel():
                return z
            shape = [-1 if index == axis % z.dim() else 1 for index in range(z.dim())]
            offset = bias.detach().reshape(shape)
            z = z - offset
            rows = [x.movedim(axis, 0).reshape(x.shape[axis], -1).float() for x in (y - offset, z)]
            fits[name].update(*rows)
            alpha, beta = solved[name] = fits[name].solve(kind)
            return z * alpha.to(z.dtype).reshape(shape) + (beta.to(z.dtype).reshape(shape) + offset)

        return hook

    # Copies that share parameters: hooks and the simulation's weights must not reach the twin.
    original = copy.deepcopy(twin, {id(p): p for p in twin.parameters()})
    simulated = copy.deepcopy(twin, {id(p): p for p in twin.parameters()})
    for name in names:
        original.get_submodule(name).register_forward_hook(record(name))
    simulate(simulated, plan, weights, grids)
    for name in names:
        simulated.get_submodule(name).register_forward_hook(fit(name))
    if names:
        batches = iter(batches)
        head = next(batches)
        size = _chunk_size(original, recorded, head)
        parts = chunks(itertools.chain([head], batches), size, EXAMPLES)
        for number, call in enumerate(progress(parts, "correcting")):
            run(original, call, f"calibration chunk {number}")
            run(simulated, call, f"calibration chunk {number}")
            for kept in recorded.values():
                kept.clear()
    corrected = {name: dict(site) for name, site in weights.items()}
    biases: dict[str, Tensor] = {}
    for name, (alpha, beta) in solved.items():
        weight = corrected[name]["weight"]
        assert isinstance(weight.scale, Tensor)
        scale = weight.scale * alpha.to(weight.scale.dtype).reshape(-1, 1)
        corrected[name]["weight"] = replace(weight, scale=scale)
        bias = twin.get_submodule(name).bias
        assert isinstance(bias, Tensor)
        biases[name] = (bias.detach().double() + beta).to(bias.dtype)
    return corrected, biases


def _is_correctable(
    name: str,
    twin: nn.Module,
    plan: Plan,
    weights: Mapping[str, Mapping[str, QTensor]],
    grids: Mapping[str, Grid | None],
) -> bool:
    module = twin.get_submodule(name)
    tied = any(name == member.rpartition(".")[0] for tie in plan.ties for member in tie)
    if grids[name] is None or tied or "weight" not in module._parameters or "weight" not in weights[name]:
        return False
    scale = weights[name]["weight"].scale
    by_row = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.shape[1] == 1
    return by_row and isinstance(module._parameters.get("bias"), Tensor)


def _channel_axis(module: nn.Module) -> int:
    axis = layer_class(module).channel_axis(module)
    assert axis is not None
    return axis


def simulate(
    model: nn.Module,
    plan: Plan,
    weights: Mapping[str, Mapping[str, QTensor]],
    grids: Mapping[str, Grid | None],
) -> None:
    """The float layers made to compute what the quantized ones will: rounded inputs and weights."""
    for name, grid in grids.items():
        if grid is None:
            continue
        module = model.get_submodule(name)
        spec = plan.sites[name].scheme.input
        assert spec is not None

        def round_input(module: nn.Module, args: Any, kwargs: Any, spec: Any = spec, grid: Grid = grid) -> Any:
            x = args[0] if args else kwargs["input"]
            return (fake_quantize(x, spec, *grid), *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

        module.register_forward_pre_hook(round_input, with_kwargs=True)
        for key, weight in weights[name].items():
            original = module._parameters.get(key)
            if original is None:  # a parametrized weight, which is computed
                continue
            rounded = layer_class(module).from_matrix(module, dequantize(weight, original.dtype))
            module._parameters[key] = nn.Parameter(rounded, requires_grad=False)


def _chunk_size(original: nn.Module, recorded: Mapping[str, list[Tensor]], call: Call) -> int:
    """How many examples at a time have about CHUNK_BYTES of results."""
    try:
        for one in chunks([call], 1, 1):
            run(original, one, "calibration batch 0")
    except CalibrationError:  # the first axis is no batch
        return EXAMPLES
    size = sum(y.nbytes for kept in recorded.values() for y in kept)
    for kept in recorded.values():
        kept.clear()
    return max(1, CHUNK_BYTES // max(1, size))
