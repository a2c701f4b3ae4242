"""The Python code of README.md, and of the documents after it, runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


class Encoder(nn.Module):
    """A model that has the layers which the README's examples name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([nn.Module()])
        self.encoder.layer[0].output = nn.Module()
        self.encoder.layer[0].output.dense = nn.Linear(256, 256)
        self.classifier = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.encoder.layer[0].output.dense(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_code_blocks_run(
    decoder: Callable[..., Any],
    write_tokenizer: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    decoder("llama", vocab_size=512).save_pretrained(tmp_path / "Llama-2-7b-hf")
    write_tokenizer(tmp_path / "Llama-2-7b-hf")
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    batches = [torch.randn(16, 256) for _ in range(3)]
    model = Encoder().eval()
    names: dict[str, object] = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": model,
        "batches": batches,
        "batch": {"input_ids": torch.tensor([[1, 5, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
        "example_inputs": batches[0][:1],
        "evaluate": lambda candidate: torch.ones(4000) * candidate(batches[0]).isfinite().all(),
    }
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(block.replace("minutes=1", "minutes=0.01"), names)


def test_figures_are_those_of_the_last_measurement() -> None:
    script = ROOT / "benchmarks" / "tables.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)
