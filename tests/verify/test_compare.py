"""compare: everything side by side, and its JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import Budget, CalibrationError, EvaluationError, PlanError
from fewbit.batches import Call
from fewbit.targets import tensor_bytes
from fewbit.verify import Latency, latencies, layer_errors, output_error


def test_comparison_holds_what_the_parts_say(mlp: nn.Module, vectors: list[Tensor]) -> None:
    quantized = fewbit.quantize(mlp, "int8-dynamic")
    comparison = fewbit.compare(mlp, quantized, vectors)
    batches = [Call((x,), {}) for x in vectors]
    assert comparison.recipe == "int8-dynamic" and comparison.summary == fewbit.plan_of(quantized).summary()
    assert comparison.outputs == output_error(mlp, quantized, batches)
    assert comparison.layers == tuple(layer_errors(mlp, quantized, batches[:2]))
    assert comparison.float_bytes == tensor_bytes(mlp) == sum(p.nbytes for p in mlp.parameters())
    assert comparison.quantized_bytes == tensor_bytes(quantized) < 0.3 * comparison.float_bytes
    assert comparison.disk_bytes == fewbit.plan_of(quantized).nbytes
    assert comparison.scores is None and comparison.verdict is None
    assert comparison.speedup == comparison.float_latency.median / comparison.quantized_latency.median


def test_scores_and_verdict(mlp: nn.Module, vectors: list[Tensor]) -> None:
    quantized = fewbit.quantize(mlp, "int8-dynamic")
    x = torch.cat(vectors)
    with torch.no_grad():
        labels = mlp(x).argmax(1)

    def evaluate(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return (model(x).argmax(1) == labels).float()

    comparison = fewbit.compare(mlp, quantized, vectors, evaluate, Budget(0.5))
    assert comparison.scores is not None and comparison.scores.count == len(x)
    assert comparison.scores.float_score == 1.0
    assert comparison.verdict is not None and comparison.verdict.verdict == "pass"
    text = str(comparison)
    assert "verdict  pass" in text and "score    1 -> " in text and "same top-1" in text
    without = fewbit.compare(mlp, quantized, vectors, evaluate)
    assert without.scores == comparison.scores and without.verdict is None


def test_json_survives(mlp: nn.Module, vectors: list[Tensor]) -> None:
    comparison = fewbit.compare(mlp, fewbit.quantize(mlp, "int8-dynamic"), vectors, lambda _: 0.5, Budget(0.1))
    data = comparison.to_json()
    assert json.loads(json.dumps(data)) == {**data, "layers": list(data["layers"])}
    assert data["verdict"]["verdict"] == "pass" and data["scores"]["interval"] is None
    assert "chance is not accounted for" in str(comparison)


def test_modes_are_restored_and_a_generator_will_do(mlp: nn.Module, vectors: list[Tensor]) -> None:
    quantized = fewbit.quantize(mlp, "int8-dynamic").train()
    mlp.train()
    comparison = fewbit.compare(mlp, quantized, (x for x in vectors))
    assert all(module.training for module in (*mlp.modules(), *quantized.modules()))
    assert comparison.outputs.agreement is not None


def test_mistakes_are_named(mlp: nn.Module, vectors: list[Tensor]) -> None:
    quantized = fewbit.quantize(mlp, "int8-dynamic")
    with pytest.raises(PlanError, match="not quantized by fewbit"):
        fewbit.compare(mlp, mlp, vectors)
    with pytest.raises(CalibrationError, match="needs an iterable of batches"):
        fewbit.compare(mlp, quantized, vectors[0])
    with pytest.raises(CalibrationError, match="no batch"):
        fewbit.compare(mlp, quantized, [])
    with pytest.raises(EvaluationError, match=r"evaluate\(float\) raised ZeroDivisionError"):
        fewbit.compare(mlp, quantized, vectors, lambda _: 1 / 0)


def test_latencies_are_of_every_model_and_in_order(mlp: nn.Module, vectors: list[Tensor]) -> None:
    found = latencies({"a": mlp, "b": mlp}, Call((vectors[0],), {}), seconds=0.0)
    assert list(found) == ["a", "b"]
    for latency in found.values():
        assert isinstance(latency, Latency) and latency.runs == 5 and latency.threads == torch.get_num_threads()
        assert 0 < latency.low <= latency.median <= latency.high
        assert set(latency.to_json()) == {"median", "low", "high", "runs", "threads"}
