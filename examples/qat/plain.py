"""Quantization-aware training in a loop of one's own, with labels: Fashion-MNIST with 4-bit weights and activations.

python examples/qat/plain.py [epochs]
"""

from __future__ import annotations

import sys

import torch
from fashion import RECIPE, load, report
from torch import nn

import fewbit


def main(epochs: int) -> None:
    torch.manual_seed(0)
    task, batches = load()
    student = fewbit.prepare_qat(task.model, RECIPE, task.calibration)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for epoch in range(epochs):
        for images, labels in batches:
            loss = nn.functional.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    report(task, fewbit.convert(student))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2] or ["2"]))
