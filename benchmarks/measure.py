"""What the benchmarks share: tasks of examples/, the machine, results as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fewbit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def example(name: str) -> fewbit.Task:
    """The task of an example."""
    return fewbit.load_task(ROOT / "examples" / name / "task.py")


class Recorder(nn.Module):
    """A model that keeps what it returned, so that an evaluation's outputs can be compared too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        self.outputs.append(output)
        return output


def kl_and_flips(float_logits: Tensor, logits: Tensor) -> tuple[float, int]:
    """Mean KL(float | quantized) in nats, and the number of changed top-1 predictions, of ``[N, classes]``."""
    p, q = (torch.log_softmax(x.double(), 1) for x in (float_logits, logits))
    flips = int((p.argmax(1) != q.argmax(1)).sum())
    return float((p.exp() * (p - q)).sum(1).mean()), flips


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table and write them to results/NAME.json with the machine."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": asdict(fewbit.probe()), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
