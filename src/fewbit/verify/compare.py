"""Everything that is known of a quantized model beside its float one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fewbit.batches import calls, evaluating, to_call
from fewbit.pipeline import plan_of
from fewbit.targets import tensor_bytes
from fewbit.verify.latency import Latency, latencies
from fewbit.verify.layers import LayerError, layer_errors
from fewbit.verify.outputs import OutputError, output_error
from fewbit.verify.paired import Budget, Paired, Verdict, judge, paired, scores_of

LAYER_BATCHES = 2  # batches that the layers are compared on


@dataclass(frozen=True)
class Comparison:
    """A float model and its quantized copy, side by side. Sizes in bytes, latencies in milliseconds."""

    recipe: str
    summary: str
    outputs: OutputError
    layers: tuple[LayerError, ...]
    float_bytes: int
    quantized_bytes: int
    disk_bytes: int
    float_latency: Latency
    quantized_latency: Latency
    scores: Paired | None
    verdict: Verdict | None

    @property
    def speedup(self) -> float:
        return self.float_latency.median / self.quantized_latency.median

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "summary": self.summary,
            "outputs": self.outputs.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "float_bytes": self.float_bytes,
            "quantized_bytes": self.quantized_bytes,
            "disk_bytes": self.disk_bytes,
            "float_latency": self.float_latency.to_json(),
            "quantized_latency": self.quantized_latency.to_json(),
            "scores": None if self.scores is None else self.scores.to_json(),
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }

    def __str__(self) -> str:
        ratio = self.float_bytes / self.quantized_bytes
        lines = [
            f"{self.recipe}: {self.summary}",
            f"size     {self.float_bytes / 1e6:.2f} -> {self.quantized_bytes / 1e6:.2f} MB ({ratio:.2f}x smaller)",
            f"latency  {self.float_latency.median:.2f} -> {self.quantized_latency.median:.2f} ms "
            f"({self.speedup:.2f}x the speed of float)",
            f"outputs  SQNR {self.outputs.sqnr:.1f} dB"
            + ("" if self.outputs.kl is None else f", KL {self.outputs.kl:.5f}")
            + ("" if self.outputs.agreement is None else f", same top-1 {100 * self.outputs.agreement:.2f} %"),
        ]
        if self.scores is not None:
            interval = self.scores.interval()
            shown = "" if interval is None else f", 95 % interval {interval[0]:.4g} to {interval[1]:.4g}"
            flips = "" if interval is None else f"; {self.scores.lost} fell, {self.scores.won} rose"
            lines.append(
                f"score    {self.scores.float_score:.4g} -> {self.scores.quantized_score:.4g}, "
                f"drop {self.scores.drop:.4g}{shown}{flips}"
            )
        if self.verdict is not None:
            lines.append(f"verdict  {self.verdict.verdict}: {self.verdict.reason}")
        worst = ", ".join(f"{layer.name} {layer.sqnr:.1f} dB" for layer in self.layers[:3])
        return "\n".join([*lines, f"layers   worst: {worst}"])


def compare(
    model: nn.Module,
    quantized: nn.Module,
    batches: Any,
    evaluate: Callable[[nn.Module], Any] | None = None,
    budget: Budget | None = None,
) -> Comparison:
    """Measure ``quantized`` against ``model`` (both in eval mode meanwhile): outputs on ``batches``, each layer on the
    first two of them, latency on the first, and with ``evaluate`` (model -> per-example scores, higher is better, or one
    float) paired evidence on the drop, judged against ``budget``.

    Raises PlanError for a model that fewbit did not quantize, CalibrationError for batches that do not fit,
    EvaluationError for unusable scores.
    """
    plan = plan_of(quantized)
    given = list(batches) if iter(batches) is batches else batches
    with evaluating(model), evaluating(quantized):
        outputs = output_error(model, quantized, calls(model, given))
        layers = layer_errors(model, quantized, itertools.islice(calls(model, given), LAYER_BATCHES))
        first = to_call(model, next(iter(given)), "batch 0")
        timed = latencies({"float": model, "quantized": quantized}, first)
        scores = verdict = None
        if evaluate is not None:
            scores = paired(scores_of(evaluate, model, "float"), scores_of(evaluate, quantized, plan.recipe.name))
            verdict = None if budget is None else judge(scores, budget)
    return Comparison(
        recipe=plan.recipe.name,
        summary=plan.summary(),
        outputs=outputs,
        layers=tuple(layers),
        float_bytes=tensor_bytes(model),
        quantized_bytes=tensor_bytes(quantized),
        disk_bytes=plan.nbytes,
        float_latency=timed["float"],
        quantized_latency=timed["quantized"],
        scores=scores,
        verdict=verdict,
    )
