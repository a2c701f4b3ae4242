"""Float against quantized: layers, outputs, paired scores, latency, size."""

from __future__ import annotations

from fewbit.verify.compare import Comparison, compare
from fewbit.verify.latency import Latency, latencies
from fewbit.verify.layers import LayerError, layer_errors
from fewbit.verify.outputs import OutputError, output_error
from fewbit.verify.paired import Budget, Paired, Verdict, judge, paired, scores_of

__all__ = [
    "Budget",
    "Comparison",
    "Latency",
    "LayerError",
    "OutputError",
    "Paired",
    "Verdict",
    "compare",
    "judge",
    "latencies",
    "layer_errors",
    "output_error",
    "paired",
    "scores_of",
]
