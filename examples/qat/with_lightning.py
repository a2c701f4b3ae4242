"""The same with Lightning (pip install lightning): the student is a module like any other.

python examples/qat/with_lightning.py [epochs]
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from fashion import RECIPE, load, report
from torch import Tensor, nn

import fewbit


class Training(lightning.LightningModule):
    def __init__(self, student: nn.Module, steps: int) -> None:
        super().__init__()
        self.student = student
        self.steps = steps

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.student(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(epochs: int) -> None:
    lightning.seed_everything(0)
    task, batches = load()
    training = Training(fewbit.prepare_qat(task.model, RECIPE, task.calibration), epochs * len(batches))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(training, batches)
    report(task, fewbit.convert(training.student))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2] or ["2"]))
