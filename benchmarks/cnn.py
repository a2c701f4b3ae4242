"""Static int8 of CNNs: what it costs in accuracy, time and memory, and how fast the result is.

    python benchmarks/cnn.py [--accuracy] [--latency] [--quick] [--isa avx2] [--threads 1 2]
    python benchmarks/cnn.py --footprint WHAT [MODEL]      one quantization in this process; the last line is JSON

Both parts if none is named; of a part that does not run, the rows in the file stay. ``--threads`` is for latency.

Accuracy: each candidate is quantized and evaluated in a fresh process, on all cores. ``seconds`` is the time from the float
model and the calibration images in memory to the first answer: files, engines and Inductor's compiling, without its caches,
are in it, imports are not. ``unlike reference`` counts the images to which fewbit's own kernels, rounding where the engine
does, give another class. ``loaded MB`` is what was in memory before, ``peak MB`` the most until then in this process.

Latency: all candidates of a model in one process, in turns of 20 ms, medians. Engines make their threads when they are made,
so every number of threads gets its own. Eight images calibrate: the codes do not change the speed. ``error`` is relative
to FP32. Weights are random in the models of ``cnn_models``. ResNet-20 and Fashion-MNIST have small images.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cnn_models
import fewbit
from fewbit.batches import Call
from fewbit.deploy import integer_reference
from fewbit.targets import TARGETS
from measure import ISA, RESULTS, Recorder, example, in_turns, kl_and_flips, options, write
from peers import CNN, UNLIMITED, preload

TASKS = {"EfficientNet-Lite0": "efficientnet_lite0", "ResNet-20": "resnet20", "Fashion-MNIST": "fashion_mnist"}
LATENCY = ("EfficientNet-Lite0", "ResNet-20", "ResNet-18", "ResNet-50", "MobileNetV2", "Fashion-MNIST")
BATCHES = (1, 16)
CALIBRATION = 8  # images, for latency
SECONDS = 2.0  # a cell
FLOAT = "torch FP32"

Lower = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
NAMES = {"fewbit, torch": "torch", "fewbit, ONNX Runtime": "onnxruntime", "fewbit, OpenVINO": "openvino"}
FEWBIT: dict[str, Lower] = {what: functools.partial(fewbit.lower, target=target) for what, target in NAMES.items()}


def quantized(model: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
    return fewbit.quantize(model, "int8-static", calibration)


def isa(what: str) -> str:
    return UNLIMITED if "ONNX" in what or "OpenVINO" in what else ISA


# In the child -------------------------------------------------------------------------------------------------------


def memory(key: str) -> float:
    """Megabytes of this process: VmRSS are in memory, VmHWM is the most since the last ``forget_peak``.

    Not ru_maxrss: that of a process begins with the peak of the process that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def footprint(what: str, model_name: str, logits_file: str | None, quick: bool) -> dict[str, Any]:
    """Quantize and evaluate one model in this process; the logits go to a file."""
    task = example(TASKS[model_name])
    assert task.evaluate is not None
    calibration = [task.calibration[0][:CALIBRATION]] if quick else list(task.calibration)
    images = task.example_inputs.contiguous()
    preload(what)
    gc.collect()
    forget_peak()
    loaded = memory("VmRSS")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if what in FEWBIT:
            qmodel = quantized(task.model, calibration)
            model: Any = FEWBIT[what](qmodel, images)
        else:
            model = CNN[what](task.model, calibration, images, Path(folder))
        with torch.no_grad():
            model(images)
    seconds, peak = time.perf_counter() - began, memory("VmHWM")
    recorder = Recorder(model)
    score = 100 * float(torch.as_tensor(task.evaluate(recorder)).mean())
    logits = torch.cat(recorder.outputs).clone()
    if logits_file is not None:
        torch.save(logits, logits_file)
    row = {
        "part": "accuracy",
        "model": model_name,
        "what": what,
        "isa": isa(what),
        "images": len(logits),
        "top-1 %": score,
        "seconds": seconds,
        "loaded MB": loaded,
        "peak MB": peak,
    }
    if what in FEWBIT:
        reference = Recorder(integer_reference(qmodel, Call((images,), {}), TARGETS[NAMES[what]]))
        task.evaluate(reference)
        row["unlike reference"] = int((torch.cat(reference.outputs).argmax(1) != logits.argmax(1)).sum())
    return row


# In the parent ------------------------------------------------------------------------------------------------------


def in_child(what: str, model_name: str, logits_file: Path, quick: bool) -> dict[str, Any] | None:
    """``footprint`` in a fresh process; None if a package is missing."""
    command = [sys.executable, __file__, "--footprint", what, model_name, str(logits_file), *["--quick"] * quick]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{what}, {model_name}: {run.stderr}")
    row = json.loads(run.stdout.splitlines()[-1])
    if "missing" in row:
        print(f"{what}: not measured: {row['missing']}", file=sys.stderr)
        return None
    return row


def accuracy(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for model_name in list(TASKS)[-1:] if quick else TASKS:
        float_row: dict[str, Any] = {}
        for what in (*CNN, *FEWBIT):
            print(f"{model_name}: {what}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                logits_file = Path(folder) / "logits.pt"
                row = in_child(what, model_name, logits_file, quick)
                if row is None:
                    continue
                logits = torch.load(logits_file)
            if what == FLOAT:
                float_row, float_logits = row, logits
            else:
                row["drop"] = float_row["top-1 %"] - row["top-1 %"]
                row["KL"], row["flips"] = kl_and_flips(float_logits, logits)
            rows.append(row)
    return rows


def model_and_images(model_name: str) -> tuple[nn.Module, Tensor]:
    """The float model and as many images as the largest batch has."""
    if model_name in TASKS:
        task = example(TASKS[model_name])
        return task.model, task.calibration[0][: max(BATCHES)].contiguous()
    return cnn_models.MODELS[model_name](), cnn_models.images(max(BATCHES))


def made(makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What can be made with the packages that are there."""
    modules = {}
    for what, make in makers.items():
        try:
            modules[what] = make()
        except ImportError as error:
            print(f"{what}: not measured: {error}", file=sys.stderr)
    return modules


def latency(threads_counts: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for model_name in LATENCY[-1:] if quick else LATENCY:
        model, images = model_and_images(model_name)
        calibration = [images[:CALIBRATION]]
        qmodel = quantized(model, calibration)
        with tempfile.TemporaryDirectory() as folder:
            for threads in threads_counts:
                torch.set_num_threads(threads)
                print(f"{model_name}, threads: {threads}", file=sys.stderr)
                arguments = (model, calibration, images[:1], Path(folder))
                peers = made({what: functools.partial(make, *arguments) for what, make in CNN.items()})
                for batch in BATCHES[:1] if quick else BATCHES:
                    x = images[:batch]
                    own = made({what: functools.partial(lower, qmodel, x) for what, lower in FEWBIT.items()})
                    rows += timed(model_name, peers | own, x, 0.05 if quick else SECONDS)
                del peers, own
                gc.collect()
                torch.compiler.reset()
    return rows


@torch.no_grad()
def timed(model_name: str, models: dict[str, Any], x: Tensor, seconds: float) -> list[dict[str, Any]]:
    expected = models[FLOAT](x)
    outputs = {what: model(x) for what, model in models.items()}
    times = in_turns({what: [functools.partial(model, x)] for what, model in models.items()}, seconds)
    return [
        {
            "part": "latency",
            "model": model_name,
            "threads": torch.get_num_threads(),
            "batch": len(x),
            "what": what,
            "isa": isa(what),
            "ms": 1e3 * time,
            "x FP32": times[FLOAT] / time,
            "error": float((outputs[what] - expected).norm() / expected.norm()),
        }
        for what, time in times.items()
    ]


def earlier(part: str) -> list[dict[str, Any]]:
    """The rows of a part in the file."""
    file = RESULTS / f"cnn{'' if ISA == 'native' else '-' + ISA}.json"
    if not file.exists():
        return []
    return [row for row in json.loads(file.read_text())["rows"] if row["part"] == part]


def main() -> None:
    if sys.argv[1:2] == ["--footprint"]:
        what, model_name, logits_file = (*[word for word in sys.argv[2:] if word != "--quick"], None, None)[:3]
        try:
            row = footprint(str(what), model_name or next(iter(TASKS)), logits_file, "--quick" in sys.argv)
        except ImportError as error:
            row = {"missing": str(error)}
        print(json.dumps(row))
        return
    chosen = options(__doc__, "accuracy", "latency")
    both = chosen.accuracy == chosen.latency
    rows = accuracy(chosen.quick) if chosen.accuracy or both else earlier("accuracy")
    rows += latency(chosen.threads, chosen.quick) if chosen.latency or both else earlier("latency")
    write("cnn", rows, keep=not chosen.quick)


if __name__ == "__main__":
    main()
