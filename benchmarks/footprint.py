"""Time, memory and file size of quantizing MiniLM to int8-dynamic, in a fresh process.

Peak memory: how far the process's high-water mark rises above what it was with the float model loaded, beside the size of
the float model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time

import fewbit
from fewbit.targets import saved_bytes, tensor_bytes
from measure import example, write


def resident() -> int:
    """Bytes of the process's high-water mark."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    task = example("minilm")
    for parameter in task.model.parameters():  # read from a mapped file: it is in memory once it is looked at
        parameter.sum()
    loaded = resident()
    began = time.perf_counter()
    model = fewbit.quantize(task.model, "int8-dynamic")
    seconds = time.perf_counter() - began
    peak = resident()
    with tempfile.TemporaryDirectory() as folder:
        written = saved_bytes(fewbit.save(model, folder))
    float_bytes = tensor_bytes(task.model)
    print(
        json.dumps(
            {
                "model": "minilm",
                "recipe": "int8-dynamic",
                "seconds": seconds,
                "float MB": float_bytes / 1e6,
                "peak beyond the loaded model MB": (peak - loaded) / 1e6,
                "peak / float model": (float_bytes + peak - loaded) / float_bytes,
                "predicted MB": fewbit.plan_of(model).nbytes / 1e6,
                "file MB": written / 1e6,
            }
        )
    )


def main() -> None:
    if "child" in sys.argv:
        child()
        return
    runs = []
    for _ in range(3):
        output = subprocess.run([sys.executable, __file__, "child"], check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    write("footprint", sorted(runs, key=lambda run: run["seconds"])[1:2])


if __name__ == "__main__":
    main()
