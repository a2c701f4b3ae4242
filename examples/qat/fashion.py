"""What the loops here train: the Fashion-MNIST example's model, on images of the training set."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fewbit

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "fashion_mnist")]

from data import read

from fetch import fetched

EXAMPLES = Path(__file__).resolve().parents[1]
RECIPE = "int4-int4-static"
IMAGES = 4000


def load() -> tuple[fewbit.Task, DataLoader]:
    """The example's task, and shuffled batches of images and labels."""
    images, labels = read(fetched("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist", "train")
    dataset = TensorDataset(images[:IMAGES] / 255, labels[:IMAGES])
    return fewbit.load_task(EXAMPLES / "fashion_mnist" / "task.py"), DataLoader(dataset, 64, shuffle=True)


def report(task: fewbit.Task, qmodel: nn.Module) -> None:
    assert task.evaluate is not None
    rounded = fewbit.quantize(task.model, RECIPE, task.calibration)
    for what, model in (("float", task.model), (f"{RECIPE}, quantized", rounded), (f"{RECIPE}, trained", qmodel)):
        print(f"{what:28} top-1 {100 * float(task.evaluate(model).mean()):.2f} %")
