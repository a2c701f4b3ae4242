"""Speaker encoder of PyPI resemblyzer (https://arxiv.org/abs/1710.10467): three LSTM layers and a projection."""

from __future__ import annotations

from torch import Tensor, nn


class SpeakerEncoder(nn.Module):
    """Mel spectrograms ``[N, 160, 40]`` (1.6 s each) to unit embeddings ``[N, 256]``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.relu(self.linear(hidden[-1])), dim=1)
