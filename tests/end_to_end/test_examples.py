"""The examples on real models: what they promise, where their models and data are at hand (python examples/fetch.py)."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import fewbit

ROOT = Path(__file__).parents[2]
EXAMPLES = {  # name: recipe, the most that the score may lose
    "minilm": ("int8-dynamic", 0.002),
    "g2p_gru": ("int8-dynamic", 0.003),
    "resemblyzer": ("int8-dynamic", 0.001),
    "efficientnet_lite0": ("int8-static", 0.01),
    "resnet20": ("int8-static", 0.003),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_stays_within_its_budget(name: str) -> None:
    recipe, allowed = EXAMPLES[name]
    if not (ROOT / "build" / "downloads").is_dir():
        pytest.skip("the examples' models are not at hand: python examples/fetch.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that read models and data
        try:
            task = fewbit.load_task(ROOT / "examples" / name / "task.py")
        except fewbit.FewbitError as error:
            if isinstance(error.__cause__, (FileNotFoundError, ImportError)):
                pytest.skip(f"not at hand: {error}")
            raise
    assert task.evaluate is not None
    quantized = fewbit.quantize(task.model, recipe, task.calibration)
    drop = torch.as_tensor(task.evaluate(task.model)).mean() - torch.as_tensor(task.evaluate(quantized)).mean()
    assert float(drop) <= allowed
