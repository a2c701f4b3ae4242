"""How long models take for one input, measured in turns so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbit.batches import Call

SECONDS = 3.0  # per model
FEWEST, MOST = 5, 200  # runs of each model


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward: median, and the quartiles around it."""

    median: float
    low: float
    high: float
    runs: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def latencies(models: Mapping[str, nn.Module], call: Call, seconds: float = SECONDS) -> dict[str, Latency]:
    """Time the models in turns: FEWEST rounds at least, then until ``seconds`` per model are over or MOST rounds are done."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for model in models.values():  # first calls allocate and choose algorithms
            call.run(model)
        end = time.perf_counter() + seconds * len(models)
        for turn in range(MOST):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            for name, model in models.items():
                start = time.perf_counter()
                call.run(model)
                times[name].append(1000 * (time.perf_counter() - start))
    result = {}
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4)
        result[name] = Latency(median, low, high, len(samples), torch.get_num_threads())
    return result
