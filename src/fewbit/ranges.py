"""Which of several ranges an input gets: the one with which the layers that read it are nearest to what they were."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, chunks, run
from fewbit.calibration import Grid, Statistics, grid_of
from fewbit.errors import CalibrationError
from fewbit.observers import OBSERVERS
from fewbit.plan import Plan
from fewbit.progress import progress
from fewbit.qtensor import fake_quantize, qparams

EXAMPLES = 32  # that are looked at
CHUNK = 8  # at a time


def input_grids(
    twin: nn.Module, plan: Plan, statistics: Statistics, shared: Iterable[Sequence[str]], batches: Iterable[Call]
) -> dict[str, Grid | None]:
    """The static input grid of every site, None for those without. ``twin``: the float twin of the plan.

    Where the observer has several candidates, the layer's output on the first EXAMPLES examples decides: the least
    ``|y - y'|^2 / |y|^2``, y' being the output on the rounded input. ``shared``: sites that read one value get one grid.
    """
    grids: dict[str, Grid | None] = dict.fromkeys(plan.sites)
    open_choices: dict[str, list[Grid]] = {}
    for name, site in plan.sites.items():
        spec = site.scheme.input
        if spec is None or spec.observer is None:
            continue
        state = statistics[name]["input"]
        grids[name] = grid_of(state, spec, f"the input of {name!r}")
        ranges = OBSERVERS[spec.observer].candidates(state, spec)
        if len(ranges) > 1:
            open_choices[name] = [_grid(low, high, spec, name) for low, high in ranges]
    if not open_choices:
        return grids
    errors = _output_errors(twin, plan, open_choices, batches)
    groups = [[name for name in names if name in open_choices] for names in shared]
    grouped = {name for names in groups for name in names}
    for names in [*groups, *([name] for name in open_choices if name not in grouped)]:
        total = sum((errors[name] for name in names if name in errors), torch.zeros(()))
        if total.dim():  # some example reached it
            for name in names:
                grids[name] = open_choices[name][int(total.argmin())]
    return grids


def _grid(low: Tensor, high: Tensor, spec: Any, name: str) -> Grid:
    try:
        scale, zero_point = qparams(low.reshape(1), high.reshape(1), spec)
    except ValueError as error:
        raise CalibrationError(f"the input of {name!r}: {error}") from None
    assert isinstance(scale, Tensor)
    return scale, zero_point


def _output_errors(
    twin: nn.Module, plan: Plan, choices: dict[str, list[Grid]], batches: Iterable[Call]
) -> dict[str, Tensor]:
    """For each site the relative squared errors of its output, one a candidate."""
    errors: dict[str, Tensor] = {}
    model = copy.deepcopy(twin, {id(p): p for p in twin.parameters()})
    measuring = False

    def measure(name: str) -> Any:
        spec = plan.sites[name].scheme.input
        assert spec is not None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            nonlocal measuring
            if measuring or not y.numel():
                return
            measuring = True
            x = args[0] if args else kwargs["input"]
            size = y.square().sum() + 1e-30
            found = []
            for grid in choices[name]:
                arguments, keywords = (
                    (fake_quantize(x, spec, *grid), *args[1:]),
                    {k: v for k, v in kwargs.items() if k != "input"},
                )
                found.append((module(*arguments, **keywords) - y).square().sum() / size)
            errors[name] = errors.get(name, torch.zeros(len(found))) + torch.stack(found).cpu()
            measuring = False

        return hook

    for name in choices:
        model.get_submodule(name).register_forward_hook(measure(name), with_kwargs=True)
    for number, call in enumerate(progress(chunks(batches, CHUNK, EXAMPLES), "choosing ranges")):
        run(model, call, f"calibration chunk {number}")
    return errors
