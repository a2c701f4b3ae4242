"""The Kullback-Leibler divergence of logits and its gradient, a few rows at a time.

For a vocabulary of 50,000 a batch of logits is hundreds of megabytes, and each step of the formula another pass through memory;
here rows stay in the cache until their gradient is there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS = 2**20  # logits at a time


def divergence(exact: Tensor, found: Tensor, temperature: float) -> Tensor:
    """KL(exact | found) of logits ``[..., classes]`` divided by ``temperature``, in nats times its square: a float32 mean over
    all rows, in units that do not depend on the temperature. Classes of probability 0 count nothing.

    The gradient goes to ``found`` alone, and has none of its own.
    """
    return cast(Tensor, _Divergence.apply(exact.flatten(0, -2), found.flatten(0, -2), temperature))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, found: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(found) if ctx.needs_input_grad[1] else None
        step = max(1, ELEMENTS // max(1, found.shape[-1]))
        total = torch.zeros((), device=found.device)
        for begin in range(0, len(found), step):
            rows = slice(begin, begin + step)
            p, q = (torch.log_softmax(x[rows].float() / temperature, -1) for x in (exact, found))
            probability = p.exp()
            total += torch.where(probability > 0, probability * (p - q), 0).sum(1).sum()
            if gradient is not None:
                gradient[rows] = q.exp_().sub_(probability)
        ctx.save_for_backward(gradient)
        ctx.factor = temperature / max(1, len(found))
        return total * (temperature * ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor, None]:
        [gradient] = ctx.saved_tensors
        return None, gradient * (outer * ctx.factor), None  # not before: float16 would underflow
