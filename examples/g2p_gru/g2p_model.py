"""Grapheme to phoneme: a GRU reads the letters, a GRU writes the phonemes (PyPI g2p-en, Park & Kim)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GRAPHEMES = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = (*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH")
# In the order of the weights' rows; a vowel carries its stress, and one unstressed "UW" is left from the training data.
PHONEMES = (
    *("<pad>", "<unk>", "<s>", "</s>"),
    *sorted([*(vowel + stress for vowel in VOWELS for stress in "012"), "UW", *CONSONANTS]),
)
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")


class GraphemeToPhoneme(nn.Module):
    """Letters ``[N, T]``, each word closed by ``</s>``, and lengths ``[N]`` to logits ``[N, steps, 74]`` (greedy)."""

    def __init__(self, width: int = 256, steps: int = 20) -> None:
        super().__init__()
        self.encoder_embedding = nn.Embedding(len(GRAPHEMES), width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder_embedding = nn.Embedding(len(PHONEMES), width)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, len(PHONEMES))
        self.steps = steps

    def forward(self, graphemes: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.encoder(self.encoder_embedding(graphemes))
        # The state after a word's last letter: what follows is padding.
        last = (lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])
        hidden = states.gather(1, last).transpose(0, 1)
        token = torch.full_like(lengths, START)[:, None]
        logits = []
        for _ in range(self.steps):
            state, hidden = self.decoder(self.decoder_embedding(token), hidden)
            logits.append(self.output(state))
            token = logits[-1].argmax(2)
        return torch.cat(logits, 1)
