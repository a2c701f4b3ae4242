"""The demo's task: a residual CNN on the 10,000 Fashion-MNIST test images, 1,000 to calibrate and 9,000 to judge."""

from __future__ import annotations

from pathlib import Path

import torch
from data import read
from model import FashionNet
from safetensors.torch import load_file
from torch import Tensor, nn

import fewbit

HERE = Path(__file__).parent
CALIBRATION = 1000


def task() -> fewbit.Task:
    images, labels = read(HERE, "t10k")
    model = FashionNet().eval()
    model.load_state_dict(load_file(HERE / "weights.safetensors"))
    calibration = list((images[:CALIBRATION] / 255).split(100))

    @torch.no_grad()
    def evaluate(candidate: nn.Module) -> Tensor:
        """1 for each image that is classified right."""
        batches = zip(images[CALIBRATION:].split(250), labels[CALIBRATION:].split(250), strict=True)
        return torch.cat([(candidate(x / 255).argmax(1) == y).float() for x, y in batches])

    return fewbit.Task(
        model=model, calibration=calibration, evaluate=evaluate, example_inputs=images[CALIBRATION:][:1] / 255
    )
