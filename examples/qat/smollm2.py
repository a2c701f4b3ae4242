"""SmolLM2-135M with 4-bit weights learns the float model's next-token distributions on Emma: steps of the grids and norms
alone, then all parameters. Perplexity is that of Austen's other novels.

python examples/qat/smollm2.py [steps] [windows]
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbit

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "smollm2")]

from task import task

RECIPE = "int4-weight-only"
LENGTH = 256  # tokens of a sequence
BATCH = 4


def perplexity(this: fewbit.Task, model: nn.Module) -> float:
    assert this.evaluate is not None
    return math.exp(-float(this.evaluate(model).mean()))


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    p, q = (torch.log_softmax(x.flatten(0, 1), 1) for x in (target, logits))
    return nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def trained(teacher: nn.Module, batches: list[Any], sequences: Tensor, steps: int, everything: bool) -> nn.Module:
    student = fewbit.prepare_qat(teacher, RECIPE, batches)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(everything or "log_scale" in name or "norm" in name)
    chosen = [parameter for parameter in student.parameters() if parameter.requires_grad]
    print(f"{sum(parameter.numel() for parameter in chosen) / 1e6:.1f} million parameters are trained")
    optimizer = torch.optim.AdamW(chosen, lr=1e-5 if everything else 1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        tokens = sequences[torch.randperm(len(sequences), generator=generator)[:BATCH]]
        with torch.no_grad():
            target = teacher(input_ids=tokens).logits
        loss = divergence(student(input_ids=tokens).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: divergence {loss.item():.4f}", flush=True)
    return fewbit.convert(student)


def main(steps: int = 40, windows: int = 8) -> None:
    this = task(windows)
    sequences = torch.cat([batch["input_ids"] for batch in this.calibration]).view(-1, LENGTH)
    print(f"float      perplexity {perplexity(this, this.model):.3f}")
    print(f"quantized  perplexity {perplexity(this, fewbit.quantize(this.model, RECIPE, this.calibration)):.3f}")
    for everything in (False, True):
        began = time.perf_counter()
        qmodel = trained(this.model, this.calibration, sequences, steps, everything)
        seconds = time.perf_counter() - began
        what = "all" if everything else "steps and norms"
        print(f"trained    perplexity {perplexity(this, qmodel):.3f}  ({what}, {seconds:.0f} s)")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
