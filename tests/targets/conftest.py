"""A checkpoint that tests damage or replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, per_channel

SCHEME = Scheme(QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, nn.Module]:
    """A folder, the float model and the quantized one in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    quantized = fewbit.quantize(model, Recipe("all", (Rule("*", SCHEME),)))
    return fewbit.save(quantized, tmp_path / "out"), model, quantized
