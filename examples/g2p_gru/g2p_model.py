"""Grapheme to phoneme: a GRU reads the letters, a GRU writes the phonemes (PyPI g2p-en, Park & Kim)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GRAPHEMES = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
PHONEMES = (
    "<pad> <unk> <s> </s> "
    "AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH "
    "EH0 EH1 EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 "
    "OW2 OY0 OY1 OY2 P R S SH T TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH"
).split()
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
