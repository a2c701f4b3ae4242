"""Fashion-MNIST (Xiao et al., MIT licence, https://arxiv.org/abs/1708.07747) from its gzipped IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """``part`` is "train" or "t10k". Images ``[N, 1, 28, 28]`` uint8, labels ``[N]`` int64."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
