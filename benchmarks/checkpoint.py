"""Whether each saved model gives bit-equal outputs in a fresh process, and has the size that its plan predicts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.batches import to_call
from fewbit.targets import saved_bytes, tensor_bytes
from fewbit.verify.outputs import main_output
from measure import example, write

EXAMPLES = {
    "fashion_mnist": "int8-static",
    "minilm": "int8-dynamic",
    "g2p_gru": "int8-dynamic",
    "resemblyzer": "int8-dynamic",
    "efficientnet_lite0": "int8-static",
    "resnet20": "int8-static",
    "smollm2": "int4-weight-only",
}


@torch.no_grad()
def output(task: fewbit.Task, model: torch.nn.Module) -> torch.Tensor:
    return main_output(to_call(model, task.example_inputs, "example_inputs").run(model))[0].contiguous()


def child(name: str, folder: Path) -> None:
    task = example(name)
    loaded = fewbit.load(folder, task.model.to("meta"))
    save_file({"output": output(task, loaded)}, folder / "output.safetensors")


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        return
    rows = []
    for name, recipe in EXAMPLES.items():
        task = example(name)
        model = fewbit.quantize(task.model, recipe, task.calibration if recipe == "int8-static" else None)
        expected = output(task, model)
        with tempfile.TemporaryDirectory() as folder:
            written = saved_bytes(fewbit.save(model, folder))
            subprocess.run([sys.executable, __file__, "child", name, folder], check=True)
            found = load_file(Path(folder) / "output.safetensors")["output"]
        predicted = fewbit.plan_of(model).nbytes
        rows.append(
            {
                "model": name,
                "recipe": recipe,
                "float MB": tensor_bytes(task.model) / 1e6,
                "predicted MB": predicted / 1e6,
                "file MB": written / 1e6,
                "off %": 100 * abs(written - predicted) / written,
                "bit-equal": torch.equal(expected, found),
            }
        )
    write("checkpoint", rows)


if __name__ == "__main__":
    main()
