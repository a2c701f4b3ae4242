"""A first try of a quantized language model: its folder and a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewbit.errors import UnsupportedError
from fewbit.targets import load
from fewbit.texts import read_tokenizer


def complete(folder: str | Path, prompt: str, tokens: int = 64) -> str:
    """``prompt`` and what the model adds to it, ``tokens`` tokens at most, always the most probable one.

    CheckpointError for a folder that has no quantized model, FewbitError for one without a tokenizer, UnsupportedError for a
    model that does not generate.
    """
    model: Any = load(folder)
    if not hasattr(model, "generate"):
        raise UnsupportedError(f"{folder}: a {type(model).__name__} does not generate text.")
    tokenizer = read_tokenizer(folder)
    batch = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))
