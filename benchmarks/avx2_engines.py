"""The same file on a CPU with VNNI and on one without: do ONNX Runtime and OpenVINO give the same answers?

    python benchmarks/avx2_engines.py [--images 50]

x86 CPUs without VNNI add two 8-bit products in int16, saturating; engines lose accuracy there and do not say so. Here each
engine runs once on this machine and once under qemu-user as an Intel Haswell, whose CPUID has AVX2 and no more. Needs
qemu-x86_64 (Debian: qemu-user) and a CPU with VNNI to compare with. EfficientNet-Lite0 on ImageNet validation images.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewbit
from fewbit.batches import Call
from fewbit.deploy import integer_reference
from fewbit.targets import TARGETS
from measure import Recorder, example, kl_and_flips, write

EMULATED = ("qemu-x86_64", "-cpu", "Haswell")


def run(engine: str, model: str, images: str, out: str) -> None:
    """What the child process does: no torch, which would take long under emulation."""
    x = np.load(images)
    if engine == "ONNX Runtime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results = [session.run(None, {session.get_inputs()[0].name: x[i : i + 1]})[0] for i in range(len(x))]
    else:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
        results = [compiled([x[i : i + 1]])[0].copy() for i in range(len(x))]
    np.save(out, np.concatenate(results))


def outputs(engine: str, model: Path, images: Path, emulated: bool) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.npy")
        command = [*EMULATED] if emulated else []
        command += [sys.executable, __file__, "--child", engine, str(model), str(images), str(out)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return torch.from_numpy(np.load(out))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run(*sys.argv[2:6])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=650)
    count = parser.parse_args().images
    if shutil.which(EMULATED[0]) is None:
        sys.exit(f"{EMULATED[0]} is missing: apt-get install qemu-user")
    task = example("efficientnet_lite0")
    recorder = Recorder(torch.nn.Flatten())
    assert task.evaluate is not None
    task.evaluate(recorder)
    x = torch.cat(recorder.outputs).reshape(-1, 3, 224, 224)
    x = x[:: max(1, len(x) // count)][:count].contiguous()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        images = Path(folder, "x.npy")
        np.save(images, x.numpy())
        original = torch.cat([task.model(part) for part in x.split(25)])
        rows: list[dict[str, Any]] = []
        preset = fewbit.load_recipe("int8-static")
        for what, recipe in {
            "fewbit int8-static": preset,
            "the same with full 8-bit weights": full_range(preset),
        }.items():
            quantized = fewbit.quantize(task.model, recipe, task.calibration)
            call = Call((task.example_inputs,), {})
            file = fewbit.export(quantized, Path(folder, "model.onnx"), example_inputs=task.example_inputs)
            for engine, target in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
                integers = integer_reference(quantized, call, TARGETS[target])
                reference = torch.cat([integers(part) for part in x.split(25)])
                for cpu, emulated in (("this CPU", False), ("AVX2 alone", True)):
                    found = outputs(engine, file, images, emulated)
                    kl, flips = kl_and_flips(original, found)
                    other = int((found.argmax(1) != reference.argmax(1)).sum())
                    row = {"what": what, "engine": engine, "cpu": cpu, "KL": kl, "flips": flips, "images": len(x)}
                    row["other top-1 than fewbit's kernels"] = other
                    row["error to fewbit's kernels"] = float((found - reference).norm() / reference.norm())
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
    write("avx2_engines", rows)


def full_range(recipe: fewbit.Recipe) -> fewbit.Recipe:
    """The recipe without bounds on pairs of weights."""
    from ablation import with_scheme

    return with_scheme(recipe, method="mse")


if __name__ == "__main__":
    main()
