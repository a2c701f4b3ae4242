"""Models as people write them: what cannot be replaced safely is left alone, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import PER_TOKEN, PlanError, QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.verify.outputs import Noise

W = QuantSpec("int8", per_channel(0))
ALL = Recipe("all", (Rule("*", Scheme(W)),), ("split_attention", "fold_batch_norm"))


class NormAct(nn.BatchNorm2d):
    """A batch norm that does more than its name says."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


class TiedAutoencoder(nn.Module):
    """The weight that a batch norm would be folded into is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.norm = nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.norm(self.enc(x))), self.enc.weight.t())


class TwoNames(nn.Module):
    """One batch norm under two names, called by the one that is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.seq = nn.Sequential(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Functional(nn.Module):
    """A convolution whose own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.conv.weight))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def settled(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """The model with batch-norm statistics that are not 0 and 1, and an input."""
    torch.manual_seed(0)
    for _ in range(10):
        model.train()(torch.randn(shape) * 3 + 1)
    return model.eval(), torch.randn(shape)


IMAGE = (4, 3, 8, 8)
MAKERS: list[Any] = [
    pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8)), IMAGE, id="norm-subclass"),
    pytest.param(TiedAutoencoder, (8, 16), id="weight-read-twice"),
    pytest.param(TwoNames, IMAGE, id="two-names"),
    pytest.param(Functional, IMAGE, id="functional"),
    pytest.param(hooked, IMAGE, id="hook"),
]


@pytest.mark.parametrize(("make", "shape"), MAKERS)
def test_folding_never_changes_what_the_model_computes(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = settled(make(), shape)
    quantized = fewbit.quantize(model, ALL, [x])
    with torch.no_grad():
        noise = Noise()
        noise.add(model(x), quantized(x))
    assert noise.sqnr > 30


def test_a_replaced_forward_is_kept() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    first = model[0]
    first.forward = lambda input: nn.functional.linear(input, first.weight) * 3  # type: ignore[method-assign]
    plan = fewbit.plan_of(fewbit.quantize(model, ALL))
    assert list(plan.sites) == ["1"] and "its forward was replaced" in plan.skipped["0"]


def test_layers_in_a_plain_list_are_left_alone() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
            self.order = [self.first]

    plan = fewbit.make_plan(Listed(), ALL)
    assert list(plan.sites) == ["last"] and "plain list" in plan.skipped["first"]


def test_autocast_does_not_round_the_codes() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(256, 64).eval(), torch.randn(8, 256)
    quantized = fewbit.quantize(model, Recipe("dynamic", (Rule("*", Scheme(W, QuantSpec("int8", PER_TOKEN))),)))
    with torch.no_grad():
        expected = quantized(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantized(x), expected)


def test_calibration_leaves_no_trace_in_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    model = Counting()
    quantized = fewbit.quantize(model, Recipe("mse", (Rule("*", Scheme(W, method="mse")),)), [torch.randn(2, 16)] * 3)
    assert float(model.calls) == 0 and float(quantized.get_buffer("calls")) == 0


def test_raw_features_of_a_recurrent_layer_stay_float() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(8, 128, 2, batch_first=True).eval()
    quantized = fewbit.quantize(model, "int8-dynamic")
    plan = fewbit.plan_of(quantized)
    assert "weight_ih_l0" not in plan.sites[""].weights and "too small to gain" in plan.skipped["weight_ih_l0"]
    assert "quantized 1 of 1 layers" in plan.summary()
    assert torch.equal(quantized.get_parameter("weight_ih_l0"), model.weight_ih_l0)
    assert quantized.get_parameter("weight_ih_l0").data_ptr() != model.weight_ih_l0.data_ptr()


def test_two_recipes_of_one_name_are_refused() -> None:
    recipes = [fewbit.load_recipe("int8-dynamic"), fewbit.load_recipe("int8-dynamic", exclude="x")]
    with pytest.raises(PlanError, match="name of two"):
        fewbit.autoquantize(
            nn.Linear(256, 256),
            evaluate=lambda model: 1.0,
            budget=fewbit.Budget(0.1),
            example_inputs=torch.randn(1, 256),
            recipes=recipes,
        )


def test_masked_logits_are_no_error() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    noise = Noise()
    noise.add(logits, logits + torch.tensor([[0.1, 0.0, 0.0]]))
    assert 20 < noise.sqnr < 40
