"""Speech to the mel spectrograms that the speaker encoder was trained on, as librosa computes them."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

RATE = 16_000
WINDOW = 400  # 25 ms
HOP = 160  # 10 ms
MELS = 40
LOUDNESS = 10 ** (-30 / 20)  # -30 dBFS
PART_FRAMES = 160
PART_STEP = 77  # 1.3 parts a second


def read_wav(file: Path) -> Tensor:
    """16-bit mono file to samples ``[T]`` in [-1, 1] at 16 kHz; a quiet recording is made louder."""
    with wave.open(str(file)) as recording:
        rate = recording.getframerate()
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2") / 32767
    samples = resample_poly(samples, RATE, rate)
    gain = max(1.0, LOUDNESS / np.sqrt(np.mean(samples**2)))
    return torch.from_numpy(samples * gain).float()


def hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def mel_filters() -> Tensor:
    """Triangles of equal area ``[40, 201]``: bins of the Fourier transform to mel bands."""
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    edges = mel_to_hz(np.linspace(0, hz_to_mel(RATE / 2), MELS + 2))
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return torch.from_numpy(triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


def mel_spectrogram(samples: Tensor) -> Tensor:
    """Samples ``[T]`` to the power in mel bands ``[1 + T // 160, 40]`` (not its logarithm)."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)
    return (mel_filters() @ spectrum.abs().square()).T


def parts(samples: Tensor) -> Tensor:
    """Overlapping windows of 1.6 s ``[P, 160, 40]``; the last is kept if speech fills three quarters of it."""
    frames = -(-(len(samples) + 1) // HOP)
    starts = list(range(0, max(1, frames - PART_FRAMES + PART_STEP + 1), PART_STEP))
    if len(starts) > 1 and len(samples) - starts[-1] * HOP < 0.75 * PART_FRAMES * HOP:
        starts.pop()
    end = (starts[-1] + PART_FRAMES) * HOP
    mels = mel_spectrogram(torch.nn.functional.pad(samples, (0, max(0, end - len(samples)))))
    return torch.stack([mels[start : start + PART_FRAMES] for start in starts])
