"""Output errors: SQNR, KL and agreement, against direct computation."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit import CalibrationError, UnsupportedError
from fewbit.batches import Call
from fewbit.verify import output_error
from fewbit.verify.outputs import Noise, main_output


class Fixed(nn.Module):
    """A model that answers with the batch of this number."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, number: int) -> Any:
        return self.outputs[number]


def error_of(exact: list[Any], found: list[Any]) -> Any:
    return output_error(Fixed(exact), Fixed(found), [Call((n,), {}) for n in range(len(exact))])


def test_against_direct_computation() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(5, 7), torch.randn(3, 7)]
    found = [x + 0.3 * torch.randn(x.shape) for x in exact]
    error = error_of(exact, found)
    p, q = torch.cat(exact).double(), torch.cat(found).double()
    assert error.sqnr == pytest.approx(10 * math.log10(float(p.square().sum() / (p - q).square().sum())))
    kl = nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean")
    assert error.kl == pytest.approx(float(kl))
    assert error.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert 0 < error.agreement < 1


def test_equal_outputs() -> None:
    x = torch.randn(5, 7)
    error = error_of([x], [x])
    assert (error.sqnr, error.kl, error.agreement) == (math.inf, 0.0, 1.0)


def test_what_is_not_logits_has_no_divergence() -> None:
    x = torch.randn(2, 3, 4)
    error = error_of([x], [x + 1])
    assert error.kl is None and error.agreement is None and math.isfinite(error.sqnr)


def test_language_model_logits_are_averaged_over_all_positions() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    error = error_of([{"logits": p}], [{"logits": q}])
    kl = nn.functional.kl_div(
        q.double().flatten(0, 1).log_softmax(1),
        p.double().flatten(0, 1).log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    assert error.kl == pytest.approx(float(kl))


@pytest.mark.parametrize(
    ("output", "logits"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(2, 1), False),
        (torch.ones(2, 3, 4), False),
        ((torch.ones(2, 3), torch.zeros(1)), True),
        ([(torch.ones(2, 3, 4),)], False),
        ({"loss": torch.zeros(()), "logits": torch.ones(2, 3, 4)}, True),
        (OrderedDict(text="x", hidden=torch.ones(2, 3)), True),
    ],
    ids=["logits", "one-column", "three-axes", "tuple", "nested", "mapping", "other-mapping"],
)
def test_main_output(output: Any, logits: bool) -> None:
    tensor, found = main_output(output)
    assert found == logits and torch.equal(tensor, torch.ones(tensor.shape))


@pytest.mark.parametrize("output", ["text", None, {}, (), {"text": "x"}], ids=str)
def test_no_tensor_is_an_error(output: Any) -> None:
    with pytest.raises(UnsupportedError, match="no float tensor"):
        main_output(output)


def test_a_silent_signal() -> None:
    noise = Noise()
    assert noise.sqnr == math.inf
    noise.add(torch.zeros(3), torch.ones(3))
    assert noise.sqnr == -math.inf


def test_a_failing_model_is_named_with_its_batch() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    with pytest.raises(CalibrationError, match="batch 0: Failing raised RuntimeError"):
        output_error(nn.Identity(), Failing(), [Call((torch.ones(2),), {})])
