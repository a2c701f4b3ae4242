"""GPTQ (https://arxiv.org/abs/2210.17323) on the projected target of Qronos (https://arxiv.org/abs/2505.11695) and GPTAQ
(https://arxiv.org/abs/2504.02692).

With inputs X of the float layer and Z of the quantized one (rows are tokens), H = Z'Z and D = Z'(X - Z):

    argmin_Q |X W' - Z Q'|^2 = argmin_Q |Z (V - Q)'|^2        V = W + W D' (H + lam I)^-1

The columns of V are rounded one after the other, and what rounding leaves is made up for by those that are left, where
U'U = H^-1. A group gets its scales when its first column is due, for the weights as they are then. What comes out is kept
only if it is better than the weighted search on tokens that were held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.methods.blocks import Blocks, best_grid, best_option, levels
from fewbit.methods.method import Method
from fewbit.methods.mse import STEPS, MeanSquaredError, moved
from fewbit.qtensor import QTensor, by_rows, dequantize, quantize_with, scale_values, stored_scale
from fewbit.spec import QuantSpec

ROWS = 128  # of a weight, which choose the damping for all


@dataclass(frozen=True)
class Moments:
    """Sums over tokens: ``H`` = Z'Z and ``D`` = Z'(X - Z), ``[columns, columns]`` float64."""

    H: Tensor
    D: Tensor

    @staticmethod
    def zeros(columns: int) -> Moments:
        return Moments(*torch.zeros(2, columns, columns, dtype=torch.float64))

    def add(self, X: Tensor, Z: Tensor) -> None:
        """Take in tokens ``[tokens, columns]``, in place. Products are float32, their sums float64."""
        self.H.add_(Z.T @ Z)
        self.D.add_(Z.T @ (X - Z))

    def loss(self, W: Tensor, Q: Tensor) -> float:
        """``|X W' - Z Q'|^2`` up to what does not depend on Q."""
        E = W - Q
        return float(((E @ self.H.to(E.dtype) + 2 * (W @ self.D.T.to(E.dtype))) * E).sum(dtype=torch.float64))

    def damped(self, damping: float) -> Tensor:
        """H + lam I, positive definite; ``damping`` is lam relative to the mean of H's diagonal."""
        mean = float(self.H.diagonal().mean())
        return self.H + (damping * mean if mean > 0 else 1.0) * torch.eye(len(self.H), dtype=self.H.dtype)


def target(W: Tensor, moments: Moments, damping: float) -> Tensor:
    """V, in W's dtype."""
    factor = torch.linalg.cholesky(moments.damped(damping))
    correction = torch.cholesky_solve(moments.D @ W.double().T, factor).T
    return (W.double() + correction).to(W.dtype)


@dataclass(frozen=True)
class Gptq(Method):
    """Error feedback along the columns; without the layer's inputs, the search by importance.

    ``dampings`` of the target, relative to the mean of H's diagonal, among which held-out tokens choose (1: the target stays
    nearly W); ``damping`` is that of the feedback.
    """

    dampings: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    damping: float = 0.1

    @property
    def uses_importance(self) -> bool:
        return True

    def quantize(
        self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, pairs: tuple[Tensor, ...] = ()
    ) -> QTensor:
        return MeanSquaredError().quantize(weight, spec, importance)

    def quantize_for(self, weight: Tensor, spec: QuantSpec, moments: Moments, held_out: Moments) -> QTensor:
        """``weight`` for inputs with these moments; what is best is judged by those of other tokens."""
        weight = weight.to(torch.float32)
        searched = self.quantize(weight, spec, (moments.H + held_out.H).diagonal().to(torch.float32))
        if not by_rows(spec):
            return searched
        some = weight[:: max(1, len(weight) // ROWS)]
        losses = {d: held_out.loss(some, target(some, moments, d)) for d in self.dampings}
        best = min(losses, key=lambda d: losses[d])
        found = feed_back(target(weight, moments, best), spec, moments.damped(self.damping), searched)
        if held_out.loss(weight, dequantize(found)) >= held_out.loss(weight, dequantize(searched)):
            return searched
        return found


def feed_back(V: Tensor, spec: QuantSpec, H: Tensor, start: QTensor) -> QTensor:
    """GPTQ of ``V`` ``[rows, columns]``. ``H`` is positive definite; ``start`` has the scales of scales, if there are any."""
    size = spec.granularity.group_size or len(H)
    groups, order = _order(H.diagonal(), size)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order])), upper=True)
    h = (
        U.diagonal().square().reciprocal().to(torch.float32)[:, None]
    )  # what an error costs once the rest has made up for it
    U = (U / U.diagonal()[:, None]).to(torch.float32)  # each row over its diagonal: how much of an error goes where
    w = V.to(torch.float32).T[order]  # a column of V is a contiguous row
    scales = scale_values(start.scale, spec).clone()
    zeros = torch.zeros_like(scales) if start.zero_point is None else start.zero_point.to(scales.dtype)
    kept = start.scale
    for group, begin in zip(groups, range(0, len(w), size), strict=True):
        end = min(begin + size, len(w))
        block, feedback = w[begin:end], U[begin:end, begin:end]
        scale, zero, kept = _fitted(Blocks(block, h[begin:end]), spec, kept, scales, group)
        scales[:, group], zeros[:, group] = scale, zero
        errors = torch.empty_like(block)
        for i in range(end - begin):
            rounded = levels(block[i] / scale, spec, zero) * scale
            errors[i] = block[i] - rounded
            block[i] = rounded
            block[i + 1 :].addr_(feedback[i, i + 1 :], errors[i], alpha=-1)
        w[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1)
    zero_point = None if spec.symmetric else zeros.to(spec.number.dtype)
    return quantize_with(w[order.argsort()].T, spec, kept, zero_point)


def _order(diagonal: Tensor, size: int) -> tuple[list[int], Tensor]:
    """The groups, and the columns, in the order of their rounding: those first that matter most, while there are many left to
    make up for them. Groups stay together; a short last one stays last."""
    count = len(diagonal) // size
    whole = diagonal[: count * size].reshape(count, size)
    groups = whole.sum(1).argsort(descending=True, stable=True)
    inside = whole.argsort(dim=1, descending=True, stable=True)
    columns = (groups[:, None] * size + inside[groups]).reshape(-1)
    rest = torch.arange(count * size, len(diagonal))
    return [*groups.tolist(), *range(count, count + (len(rest) > 0))], torch.cat([columns, rest])


def _fitted(
    blocks: Blocks, spec: QuantSpec, kept: Tensor | QTensor, scales: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor | QTensor]:
    """Scale and zero point of one group of every row, and ``kept`` with these scales in it; ``scales`` are those of all."""
    exact, zero = best_grid(blocks, spec)
    wanted = scales.clone()
    wanted[:, group] = exact
    if isinstance(kept, QTensor):
        assert spec.scale is not None
        kept = quantize_with(wanted, spec.scale, kept.scale, kept.zero_point)
        options = [(scale_values(moved(kept, step), spec)[:, group], zero) for step in STEPS]
        index, zero = best_option(blocks, spec, options)
        step = torch.zeros(wanted.shape, dtype=torch.int32)
        step[:, group] = torch.tensor(STEPS, dtype=torch.int32)[index]
        kept = moved(kept, step)
    else:
        kept = stored_scale(wanted, spec)
        _, zero = best_option(blocks, spec, [(scale_values(kept, spec)[:, group], zero)])
    return scale_values(kept, spec)[:, group], zero, kept
