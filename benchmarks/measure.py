"""What the benchmarks share: tasks of examples/, options, timing in turns, the machine, results as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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

# What keeps each library below AVX-512. ONNX Runtime has no such switch; llama.cpp's wheel is built for AVX2 anyway.
LIMITS = {
    "avx2": {
        "FEWBIT_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
ISA = os.environ.get("FEWBIT_ISA", "native")
PEERS = (
    "gguf",
    "nncf",
    "onnxscript",
    "torchao",
    "transformers",
    "xllamacpp",
)  # beside those that fewbit.probe() looks at

# Seconds that one candidate runs until the next has its turn, and how much of them is not counted: the threads of the one
# before may still spin, and its data are in the caches.
TURN, SETTLE = 0.02, 0.005
SLOW = 2 * SETTLE  # a call that takes longer counts even if it is the first
FEWEST = 3  # turns
STREAM_BYTES = 512 << 20  # many times any cache


def options(description: str | None, *flags: str) -> argparse.Namespace:
    """The command line: ``--quick``, ``--isa``, ``--threads`` and on/off ``flags``. ``--isa avx2`` starts the script anew."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a few small cells, to see that it works; nothing is written"
    )
    parser.add_argument(
        "--isa", choices=["native", *LIMITS], default=ISA, help="limit every library that can be limited"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    chosen = parser.parse_args()
    if chosen.isa != ISA:
        # Libraries read these when they are loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **LIMITS[chosen.isa]})
    _began[:] = [_processor_seconds()]
    return chosen


_began: list[tuple[float, float, float]] = []  # when options() was called


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds that the machine's processors were busy, and for this process and those that it waited for; and the time."""
    own = sum(os.times()[:4])
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        everyone = (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf(
            "SC_CLK_TCK"
        )  # all but idle and waiting for a disk
    except OSError:
        everyone = own
    return everyone, own, time.perf_counter()


def _others_busy() -> float:
    """How many cores other processes kept busy since the start, on average."""
    everyone, own, wall = (now - then for now, then in zip(_processor_seconds(), _began[0], strict=True))
    return max(0.0, everyone - own) / wall


def in_turns(calls: Mapping[str, Sequence[Callable[[], Any]]], seconds: float) -> dict[str, float]:
    """Median seconds of one call of each candidate, which run in turns until each had ``seconds``.

    A candidate is one function, or several that do the same with different copies of the weights, called one after another.
    """
    cycles = {name: itertools.cycle(copies) for name, copies in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for copies in calls.values():  # first calls allocate and choose algorithms
        for call in copies:
            call()
    for turn in itertools.count():
        waiting = [name for name in calls if turn < FEWEST or spent[name] < seconds]
        if not waiting:
            break
        for name in waiting:
            begin = time.perf_counter()
            for call in cycles[name]:
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                if start - begin >= SETTLE or end - start >= SLOW:
                    samples[name].append(end - start)
                if end - begin >= TURN:
                    break
            spent[name] += end - begin
    return {name: statistics.median(times) for name, times in samples.items()}


def stream_read() -> Callable[[], Any]:
    """What reads STREAM_BYTES from memory the fastest of several loops, with torch's current number of threads."""
    data = torch.ones(STREAM_BYTES // 4)
    matrix = data.view(-1, 4096)
    vector = torch.ones(4096)
    loops = [data.sum, data.view(torch.int64).sum, data.max, lambda: matrix @ vector]
    times = in_turns({str(index): [loop] for index, loop in enumerate(loops)}, 0.1)
    return loops[int(min(times, key=lambda index: times[index]))]


def stream_bandwidth() -> float:
    """Bytes a second of ``stream_read``."""
    return STREAM_BYTES / in_turns({"read": [stream_read()]}, 0.3)["read"]


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


def write(name: str, rows: list[dict[str, Any]], keep: bool = True) -> None:
    """Print the rows as a table and write them to results/NAME.json with the machine; NAME-avx2 if limited to AVX2."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console().print(table)
    busy = _others_busy() if _began else None
    if busy is not None:
        print(f"Other processes kept {busy:.2f} cores busy.{' The figures are wrong.' if busy > 0.1 else ''}")
    if not keep:
        return
    RESULTS.mkdir(exist_ok=True)
    name += "" if ISA == "native" else f"-{ISA}"
    machine = asdict(fewbit.probe())
    machine["versions"] |= {package: version for package in PEERS if (version := _version(package))}
    if busy is not None:
        machine["cores busy with other processes"] = round(busy, 3)
    data = {"machine": machine, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
