"""The divergence of logits beside torch's, in pieces and whole."""

from __future__ import annotations

import pytest
import torch

import fewbit.divergence
from fewbit.divergence import divergence


@pytest.mark.parametrize("elements", [1, 100, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient(elements: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewbit.divergence, "ELEMENTS", elements)
    torch.manual_seed(0)
    exact, found = 3 * torch.randn(2, 5, 30), (3 * torch.randn(2, 5, 30)).requires_grad_()
    p, q = ((x / temperature).log_softmax(-1).flatten(0, 1) for x in (exact, found))
    expected = temperature**2 * torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    value = divergence(exact, found, temperature)
    torch.testing.assert_close(value, expected)
    [gradient], [wanted] = (torch.autograd.grad(7 * x, found) for x in (value, expected))
    torch.testing.assert_close(gradient, wanted)


def test_classes_that_cannot_be_count_nothing() -> None:
    torch.manual_seed(0)
    exact, found = torch.randn(4, 8), torch.randn(4, 8)
    expected = divergence(exact[:, :5], found[:, :5], 1.0)
    exact[:, 5:] = found[:, 5:] = -torch.inf
    found.requires_grad_()
    value = divergence(exact, found, 1.0)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert found.grad is not None and bool(found.grad.isfinite().all()) and not bool(found.grad[:, 5:].any())


def test_half_precision_logits_have_gradients_of_their_dtype() -> None:
    torch.manual_seed(0)
    exact, found = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16().requires_grad_()
    value = divergence(exact, found, 2.0)
    assert value.dtype == torch.float32
    value.backward()
    assert found.grad is not None and found.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, divergence(exact.float(), found.float(), 2.0))
