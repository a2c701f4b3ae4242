"""How far a quantized model's outputs are from the float model's on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, run


@dataclass(frozen=True)
class OutputError:
    """``sqnr``: signal to quantization noise in dB (infinite if equal). For logits also, averaged over all distributions:
    ``kl`` the divergence of the quantized from the float one in nats, and ``agreement``, the share of equal top-1."""

    sqnr: float
    kl: float | None
    agreement: float | None


def main_output(output: Any) -> tuple[Tensor, bool]:
    """The tensor to compare in a model's output, and whether it is logits.

    A mapping's "logits", else its first tensor; a sequence's first. Two-dimensional float tensors count as logits.
    """
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return output["logits"], True
        output = next((value for value in output.values() if isinstance(value, Tensor)), None)
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model's output is a {type(output).__name__}, not a tensor, tuple or mapping of tensors.")
    return output, output.dim() == 2 and output.shape[1] > 1


class Noise:
    """Sums of squares of a signal and of its error, over many tensors."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.error = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        self.signal += float(exact.double().square().sum())
        self.error += float((approximate.double() - exact.double()).square().sum())

    @property
    def sqnr(self) -> float:
        """In dB."""
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.error) if self.signal > 0 else -math.inf


def output_error(model: nn.Module, quantized: nn.Module, batches: Iterable[Call]) -> OutputError:
    """Run both models on all batches. CalibrationError if one of them fails."""
    noise = Noise()
    kl = agreement = 0.0
    rows = 0
    for number, call in enumerate(batches):
        exact, logits = main_output(run(model, call, f"batch {number}"))
        approximate, _ = main_output(run(quantized, call, f"batch {number}"))
        noise.add(exact, approximate)
        if logits:
            p, q = (torch.log_softmax(x.double(), -1).flatten(0, -2) for x in (exact, approximate))
            kl += float((p.exp() * (p - q)).sum())
            agreement += float((p.argmax(-1) == q.argmax(-1)).sum())
            rows += len(p)
    return OutputError(noise.sqnr, kl / rows if rows else None, agreement / rows if rows else None)
