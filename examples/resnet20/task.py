"""ResNet-20 on CIFAR-10: 1000 test images calibrate, the other 9000 measure top-1 accuracy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fewbit

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from cifar_resnet import ResNet20

from fetch import shared_data

RECIPE = "int8-static"
CALIBRATION_IMAGES = 1000
BATCH_SIZE = 250
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def load_model(folder: Path) -> ResNet20:
    model = ResNet20()
    # The file leaves out the batch counters, which inference does not read.
    missing, unexpected = model.load_state_dict(load_file(folder / "resnet20.safetensors"), strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"resnet20.safetensors does not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def normalize(images: Tensor) -> Tensor:
    """``[N, 3, 32, 32]`` uint8 to normalized float."""
    return (images / 255 - MEAN) / STD


def task() -> fewbit.Task:
    folder = shared_data("cifar10")
    with np.load(folder / "images.npz") as file:
        images = torch.from_numpy(file["x"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["y"].astype(np.int64)).flatten()
    # The file is sorted by class: without the shuffle, calibration would see aeroplanes only.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    calibration = [normalize(images[part]) for part in order[:CALIBRATION_IMAGES].split(BATCH_SIZE)]
    images, labels = images[order[CALIBRATION_IMAGES:]], labels[order[CALIBRATION_IMAGES:]]

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> Tensor:
        predicted = torch.cat([model(normalize(batch)).argmax(1) for batch in images.split(BATCH_SIZE)])
        return (predicted == labels).float()

    return fewbit.Task(
        model=load_model(folder), calibration=calibration, evaluate=evaluate, example_inputs=normalize(images[:1])
    )


if __name__ == "__main__":
    this = task()
    print(f"float        top-1 {100 * this.evaluate(this.model).mean():.2f} %")
    quantized = fewbit.quantize(this.model, RECIPE, calibration=this.calibration)
    print(f"{RECIPE}  top-1 {100 * this.evaluate(quantized).mean():.2f} %")
