"""fuse_activation: same function, where it must not be done, and what becomes of the layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, QuickGELUActivation

import fewbit
from fewbit.graph import read_topology
from fewbit.nn import FusedLinear
from fewbit.transforms import TRANSFORMS
from fewbit.transforms.fuse_activation import Linear

FUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ReLU": (nn.ReLU, "relu"),
    "ReLU-inplace": (lambda: nn.ReLU(inplace=True), "relu"),
    "GELU": (nn.GELU, "gelu"),
    "GELU-tanh": (lambda: nn.GELU(approximate="tanh"), "gelu_tanh"),
    "SiLU": (nn.SiLU, "silu"),
    **{
        f"transformers-{name}": (lambda name=name: ACT2FN[name], kind)  # type: ignore[misc]
        for name, kind in {
            "gelu": "gelu",
            "gelu_python": "gelu",
            "gelu_new": "gelu_tanh",
            "gelu_fast": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
            "silu": "silu",
            "swish": "silu",
            "relu": "relu",
        }.items()
    },
}


def places_of(model: nn.Module, *args: Tensor) -> list[list[str]]:
    topology = read_topology(model.eval(), args, {})
    assert not isinstance(topology, str), topology
    return TRANSFORMS["fuse_activation"].find(model, topology)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "kind"), FUSED.values(), ids=FUSED)
def test_fused_model_computes_the_same(make: Callable[[], nn.Module], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), make(), nn.Linear(6, 3)).to(dtype)
    x = 3 * torch.randn(5, 8, dtype=dtype)
    places = places_of(model, x)
    assert places == [["0", "1", kind]]
    fused = TRANSFORMS["fuse_activation"].apply(copy.deepcopy(model), places)
    assert [type(module) for module in fused] == [Linear, nn.Identity, nn.Linear]
    assert fused.state_dict().keys() == model.state_dict().keys() and kind in repr(fused)
    with torch.no_grad():
        # transformers' formulas in Python round after each step.
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(fused(x), model(x), atol=tolerance, rtol=tolerance)
        assert torch.equal(pickle.loads(pickle.dumps(fused))(x), fused(x))


class Pair(nn.Module):
    """A layer and an activation, put together as ``rule`` says."""

    def __init__(self, rule: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.other, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, self.act, x)


NOT_FUSED: dict[str, Callable[[Pair, nn.Module, Tensor], Tensor]] = {
    "result-used-twice": lambda m, act, x: act(y := m.layer(x)) + y,
    "layer-called-twice": lambda m, act, x: act(m.layer(x)) + m.layer(2 * x),
    "activation-of-something-else-too": lambda m, act, x: act(m.layer(x)) + act(x),
    "activation-of-another-that-cannot": lambda m, act, x: act(m.layer(x)) + act(y := m.other(x)) + y,
    "layer-of-itself": lambda m, act, x: act(m.layer(m.layer(x))),
    "activation-of-itself": lambda m, act, x: act(act(m.layer(x))),
    "activation-in-front": lambda m, act, x: m.layer(act(x)),
    "something-between": lambda m, act, x: act(2 * m.layer(x)),
    "past-the-module": lambda m, act, x: act(nn.functional.linear(x, m.layer.weight, m.layer.bias)),  # type: ignore[arg-type]
    "past-the-activation": lambda m, act, x: act.forward(m.layer(x)),
}
SHARED: dict[str, tuple[Callable[[Pair, nn.Module, Tensor], Tensor], list[list[str]]]] = {
    "once": (lambda m, act, x: act(m.layer(x)), [["layer", "act", "gelu"]]),
    "both-twice": (lambda m, act, x: act(m.layer(act(m.layer(x)))), [["layer", "act", "gelu"]]),
    "two-layers": (
        lambda m, act, x: act(m.layer(x)) * act(m.other(x)),
        [["layer", "act", "gelu"], ["other", "act", "gelu"]],
    ),
}


@pytest.mark.parametrize("rule", NOT_FUSED.values(), ids=NOT_FUSED)
def test_not_fused_where_it_would_change_the_function(rule: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
    assert places_of(Pair(rule), torch.randn(2, 4)) == []


@pytest.mark.parametrize(("rule", "expected"), SHARED.values(), ids=SHARED)
def test_one_activation_of_several_layers(
    rule: Callable[[nn.Module, nn.Module, Tensor], Tensor], expected: list[list[str]]
) -> None:
    torch.manual_seed(0)
    model, x = Pair(rule).eval(), torch.randn(2, 4)
    assert places_of(model, x) == expected
    fused = TRANSFORMS["fuse_activation"].apply(copy.deepcopy(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_modules_under_two_names_and_in_lists() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.GELU()
            self.again = self.act
            self.parts = [self.layer, self.act]

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(2, 4)
    places = places_of(model, x)
    assert len(places) == 1
    fused = TRANSFORMS["fuse_activation"].apply(copy.deepcopy(model), places)
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_one_activation_under_two_names_that_follows_something_else_too() -> None:
    act, layer = nn.ReLU(), nn.Linear(4, 4)
    x = torch.randn(2, 4)
    assert places_of(nn.Sequential(layer, act, nn.LayerNorm(4), act), x) == []
    assert places_of(nn.Sequential(layer, act, layer, nn.LayerNorm(4)), x) == []
    assert places_of(nn.Sequential(layer, act, act), x) == []
    assert places_of(nn.Sequential(layer, layer, act), x) == []
    assert places_of(nn.Sequential(layer, act, layer, act), x) == [["0", "1", "relu"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].register_forward_hook(lambda *_: None),
        lambda m: m[1].register_forward_hook(lambda *_: None),
        lambda m: setattr(m[1], "forward", torch.relu),
        lambda m: nn.utils.parametrizations.weight_norm(m[0]),
        lambda m: m.__setitem__(1, nn.Tanh()),
        lambda m: m.__setitem__(1, QuickGELUActivation()),
        lambda m: m.__setitem__(1, type("Mine", (nn.ReLU,), {})()),
    ],
)
def test_not_fused_where_something_would_be_lost(change: Callable[[nn.Sequential], object]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    change(model)
    assert places_of(model, torch.randn(2, 4)) == []


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 192), nn.GELU(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 5)).eval()


@pytest.mark.parametrize("preset", ["int8-dynamic", "int4-dynamic"])
def test_quantized_layers_keep_the_activation_and_are_saved_with_it(preset: str, tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(7, 256)
    quantized = fewbit.quantize(model, preset, [x])
    plan = fewbit.plan_of(quantized)
    assert plan.transforms == {"fuse_activation": [["0", "1", "gelu"], ["2", "3", "relu"]]}
    assert {site.type for site in plan.sites.values()} == {"Linear"} and list(plan.sites) == ["0", "2"]
    layer = quantized.get_submodule("0")
    assert isinstance(layer, FusedLinear) and layer.activation == "gelu" and "gelu" in repr(layer)
    assert layer.weight_only().activation == "gelu"  # type: ignore[attr-defined]
    with torch.no_grad():
        y = quantized(x)
        torch.testing.assert_close(y, model(x), atol=0.1, rtol=0.1)
        assert not torch.equal(y, fewbit.quantize(model, preset, [x], exclude=["2"])(x))
        loaded = fewbit.load(fewbit.save(quantized, tmp_path / "out"), model)
        assert torch.equal(loaded(x), y) and torch.equal(copy.deepcopy(loaded)(x), y)
    assert [type(module) for module in model][1::2] == [nn.GELU, nn.ReLU] and type(model[0]) is nn.Linear


def test_a_layer_that_stays_float_computes_its_activation(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(7, 256)
    quantized = fewbit.quantize(model, "int8-dynamic", [x], exclude=["0"])
    assert type(quantized.get_submodule("0")) is Linear
    with torch.no_grad():
        assert torch.equal(quantized.get_submodule("0")(x), model[1](model[0](x)))
        loaded = fewbit.load(fewbit.save(quantized, tmp_path / "out"), model)
        assert torch.equal(loaded(x), quantized(x))


def test_without_data_nothing_is_fused_and_the_plan_says_why() -> None:
    model, x = mlp(), torch.randn(7, 256)
    plain, fused = fewbit.quantize(model, "int8-dynamic"), fewbit.quantize(model, "int8-dynamic", [x])
    assert "calibration" in fewbit.plan_of(plain).skipped["transform fuse_activation"]
    assert isinstance(plain.get_submodule("1"), nn.GELU)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), fused(x))


@pytest.mark.parametrize(
    "places",
    [
        [["1", "0", "gelu"]],
        [["0", "2", "gelu"]],
        [["0", "3", "gelu"]],
        [["0", "1", "mish"]],
        [["9", "1", "gelu"]],
        [["0", "1"]],
        [3],
    ],
)
def test_places_that_do_not_fit_the_model(places: list[object]) -> None:
    model, x = mlp(), torch.randn(7, 256)
    plan = fewbit.plan_of(fewbit.quantize(model, "int8-dynamic", [x]))
    data = {**plan.to_json(), "transforms": {"fuse_activation": places}}
    with pytest.raises(fewbit.PlanError, match="fuse_activation"):
        fewbit.pipeline.float_twin(model, fewbit.Plan.from_json(data))


def test_bert_layers_are_fused() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    )
    model, tokens = BertModel(config).eval(), torch.randint(0, 100, (2, 9))
    fused, plain = fewbit.quantize(model, "int8-dynamic", [tokens]), fewbit.quantize(model, "int8-dynamic")
    places = fewbit.plan_of(fused).transforms["fuse_activation"]
    assert [place[2] for place in places] == ["gelu", "gelu"]
    assert places[1][:2] == ["encoder.layer.1.intermediate.dense", "encoder.layer.1.intermediate.intermediate_act_fn"]
    with torch.no_grad():
        torch.testing.assert_close(
            fused(tokens).last_hidden_state, plain(tokens).last_hidden_state, atol=0.05, rtol=0.05
        )
