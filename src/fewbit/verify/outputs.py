"""How far a quantized model's outputs are from the float model's on the same inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, run
from fewbit.errors import UnsupportedError


@dataclass(frozen=True)
class OutputError:
    """``sqnr``: signal to quantization noise in dB (infinite if equal). For logits also, averaged over all distributions:
    ``kl`` the divergence of the quantized from the float one in nats, and ``agreement``, the share of equal top-1."""

    sqnr: float
    kl: float | None
    agreement: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"sqnr": finite(self.sqnr), "kl": finite(self.kl), "agreement": self.agreement}


def finite(value: float | None) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def main_output(output: Any) -> tuple[Tensor, bool]:
    """The tensor to compare in a model's output, and whether it is logits.

    A mapping's "logits", else the first float tensor anywhere in it. Two-dimensional ones count as logits.
    UnsupportedError if there is none.
    """
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"], True
    found = next(float_tensors(output), None)
    if found is None:
        raise UnsupportedError(f"the model's output, a {type(output).__name__}, has no float tensor to compare.")
    return found, found.dim() == 2 and found.shape[1] > 1


def float_tensors(output: Any) -> Iterator[Tensor]:
    """All float tensors anywhere in a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from float_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from float_tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from float_tensors(getattr(output, field.name))


class Noise:
    """Sums of squares of a signal and of its error, over many tensors."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.error = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        same = exact == approximate  # infinite ones too, where logits are masked
        exact, approximate = exact.double(), approximate.double()
        self.signal += float(torch.where(exact.isfinite(), exact, 0.0).square().sum())
        self.error += float(torch.where(same, 0.0, approximate - exact).square().sum())

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
            kl += float(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum())
            agreement += float((p.argmax(-1) == q.argmax(-1)).sum())
            rows += len(p)
    return OutputError(noise.sqnr, kl / rows if rows else None, agreement / rows if rows else None)
