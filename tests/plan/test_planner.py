"""make_plan: what is quantized, what is not and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import fewbit
from fewbit import PER_TOKEN, Plan, PlanError, QuantSpec, Recipe, Rule, Scheme, make_plan, per_channel, per_group

INT8 = Scheme(QuantSpec("int8", per_channel(0)))
INT4 = Scheme(QuantSpec("int4", per_group(4)))
ALL = Recipe("all", (Rule("*", INT8),))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))


def test_first_match_wins() -> None:
    plan = make_plan(chain(), Recipe("test", (Rule("1", INT4), Rule("*", INT8))))
    assert {name: site.scheme for name, site in plan.sites.items()} == {"0": INT8, "1": INT4, "2": INT8}


def test_works_on_meta_and_leaves_the_model_alone() -> None:
    with torch.device("meta"):
        model = chain()
    assert make_plan(model, ALL) == make_plan(chain(), ALL)


def test_exclude_names_its_pattern() -> None:
    plan = make_plan(chain(), fewbit.load_recipe(ALL, ["re:[01]"]))
    assert list(plan.sites) == ["2"] and plan.skipped == dict.fromkeys(("0", "1"), "excluded by 're:[01]'")


def test_too_few_weights() -> None:
    plan = make_plan(chain(), Recipe("test", (Rule("*", INT8, min_weights=33),)))
    assert list(plan.sites) == ["1"] and set(plan.skipped) == {"0", "2"}
    assert all("too small to gain" in reason for reason in plan.skipped.values())


def test_too_few_channels() -> None:
    plan = make_plan(chain(), Recipe("test", (Rule("*", INT8, min_weights=20, min_channels=8),)))
    assert list(plan.sites) == ["0", "1"]
    assert plan.skipped == {"2": "too small to gain: fewer than 20 weights"}
    plan = make_plan(chain(), Recipe("test", (Rule("*", INT8, min_channels=3),)))
    assert plan.skipped == {"2": "too narrow to gain: fewer than 3 output channels"}


def test_channels_are_counted_whatever_the_layout() -> None:
    model = nn.ModuleDict({"wide": Conv1D(64, 8), "narrow": Conv1D(8, 64), "rnn": nn.GRU(8, 16)})
    plan = make_plan(model, Recipe("test", (Rule("*", INT8, min_channels=40),)))
    assert list(plan.sites) == ["wide", "rnn"]
    assert plan.skipped == {"narrow": "too narrow to gain: fewer than 40 output channels"}


@pytest.mark.parametrize("preset", ["int8-dynamic", "int4-dynamic"])
@pytest.mark.parametrize("make", [nn.Linear, lambda inputs, outputs: Conv1D(outputs, inputs)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (192, 256, None),
        (768, 64, None),
        (192, 255, "too small to gain: fewer than 49152 weights"),
        (192, 192, "too small to gain: fewer than 49152 weights"),
        (4096, 63, "too narrow to gain: fewer than 64 output channels"),
        (16384, 4, "too narrow to gain: fewer than 64 output channels"),
    ],
)
def test_presets_that_quantize_inputs_on_the_fly_leave_out_what_would_not_be_faster(
    preset: str, make: Callable[[int, int], nn.Module], inputs: int, outputs: int, reason: str | None
) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"rnn": nn.GRU(16, 16), "table": nn.Embedding(64, 16), "dense": make(inputs, outputs)})
    plan = make_plan(model, fewbit.load_recipe(preset))
    assert plan.skipped == ({} if reason is None else {"dense": reason})
    assert {"rnn", "table"} <= set(plan.sites)


def test_no_rule_for_a_layer() -> None:
    plan = make_plan(chain(), Recipe("test", (Rule("1", INT8),)))
    assert plan.skipped["0"] == "no rule for Linear"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("type:Linaer", "type:Linear"), ("headd", "head"), ("typ:Linear", "type:Linear")],
)
def test_a_rule_that_matches_nothing_is_an_error(pattern: str, hint: str) -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    with pytest.raises(PlanError, match=f"matches nothing: unknown pattern '{pattern}'. Did you mean '{hint}'"):
        make_plan(model, Recipe("test", (Rule(pattern, INT8), Rule("*", INT8))))


def test_an_optional_rule_may_match_nothing() -> None:
    plan = make_plan(chain(), Recipe("test", (Rule("type:GRU", INT4, optional=True), Rule("*", INT8))))
    assert len(plan.sites) == 3


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnInit(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 8)


def test_subclasses_with_their_own_forward_are_skipped_and_others_not() -> None:
    plan = make_plan(nn.Sequential(OwnInit(), OwnForward(8, 8)), ALL)
    assert plan.sites["0"].type == "Linear"
    assert plan.skipped["1"] == "unsupported type OwnForward: it overrides Linear.forward"


@pytest.mark.parametrize("kind", ["forward", "forward-pre"])
def test_layers_with_hooks_are_skipped(kind: str) -> None:
    model = chain()
    register = model[1].register_forward_hook if kind == "forward" else model[1].register_forward_pre_hook
    handle = register(lambda *_: None)
    plan = make_plan(model, ALL)
    assert set(plan.sites) == {"0", "2"} and "hooks" in plan.skipped["1"]
    handle.remove()
    assert len(make_plan(model, ALL).sites) == 3


def test_unknown_layers_with_a_matrix_are_skipped_by_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

    plan = make_plan(nn.Sequential(nn.Linear(4, 4), Own(), nn.LayerNorm(4)), ALL)
    assert plan.skipped == {"1": "unsupported type Own"}


def test_float_count_and_bytes_hold_what_is_not_quantized() -> None:
    plan = make_plan(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)), ALL)
    assert plan.float_weights == 8 + 2 * 8 + 2 * 8
    assert plan.float_bytes >= 4 * (8 + 2 * 8 + 2 * 8 + 2 * 8) + 8


def test_nothing_to_quantize_is_an_error_with_the_reasons() -> None:
    with pytest.raises(PlanError, match="quantizes nothing in this Sequential: it has no layer with a weight matrix"):
        make_plan(nn.Sequential(nn.ReLU()), Recipe("test", ()))
    with pytest.raises(PlanError, match="'int8-dynamic' quantizes nothing in this Sequential: too small to gain"):
        make_plan(chain(), fewbit.load_recipe("int8-dynamic"))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
def test_static_ranges_for_recurrent_layers_are_refused(cls: type[nn.Module]) -> None:
    scheme = Scheme(INT8.weight, QuantSpec("uint8", symmetric=False, observer="minmax"))
    with pytest.raises(PlanError, match="rnn: rule '\\*' gives a static input range"):
        make_plan(nn.ModuleDict({"rnn": cls(4, 4)}), Recipe("test", (Rule("*", scheme),)))


def test_an_input_spec_is_dropped_for_tables() -> None:
    scheme = Scheme(INT8.weight, QuantSpec("int8", PER_TOKEN))
    plan = make_plan(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), Recipe("test", (Rule("*", scheme),)))
    assert plan.sites["0"].scheme == INT8 and plan.sites["1"].scheme == scheme


class Tied(nn.Module):
    """An embedding and a head that are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(tokens)))


def tied(recipe: Recipe) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    quantized = fewbit.quantize(Tied(), recipe)
    return quantized, fewbit.plan_of(quantized)


def test_tied_weights_quantized_alike_stay_one_tensor() -> None:
    quantized, plan = tied(ALL)
    assert plan.ties == (("embedding.weight", "head.weight"),) and not plan.skipped
    for name in ("weight_packed", "weight_scale"):
        assert quantized.get_buffer(f"embedding.{name}") is quantized.get_buffer(f"head.{name}")
    assert plan.share == (160 + 64) / (160 + 64 + 8)


@pytest.mark.parametrize(
    "rules",
    [
        (Rule("type:Linear", INT8),),
        (Rule("type:Embedding", INT8), Rule("middle", INT8)),
    ],
    ids=["head-alone", "embedding-alone"],
)
def test_half_tied_weights_stay_float_and_one(rules: tuple[Rule, ...]) -> None:
    quantized, plan = tied(Recipe("test", rules))
    assert list(plan.sites) == ["middle"] and plan.ties == ()
    assert quantized.get_parameter("embedding.weight") is quantized.get_parameter("head.weight")
    assert any(reason.startswith("tied to ") for reason in plan.skipped.values())
    assert set(plan.skipped) == {"embedding", "head"}


def test_tied_weights_of_different_formats_get_the_most_bits() -> None:
    groups = Scheme(QuantSpec("int4", per_group(32)), QuantSpec("int8", per_group(32)), "mse")
    quantized, plan = tied(Recipe("test", (Rule("type:Linear", groups), Rule("type:Embedding", INT8))))
    assert plan.sites["middle"].scheme == groups
    assert plan.sites["head"].scheme == Scheme(INT8.weight, QuantSpec("int8", PER_TOKEN), INT8.method)
    assert plan.ties == (("embedding.weight", "head.weight"),)
    assert quantized.get_buffer("embedding.weight_packed") is quantized.get_buffer("head.weight_packed")


def test_tied_weights_with_different_inputs_are_quantized_alike() -> None:
    dynamic = Scheme(INT8.weight, QuantSpec("int8", PER_TOKEN))
    quantized, plan = tied(Recipe("test", (Rule("type:Linear", dynamic), Rule("type:Embedding", INT8))))
    assert set(plan.sites) == {"embedding", "middle", "head"}
    assert quantized.get_buffer("embedding.weight_packed") is quantized.get_buffer("head.weight_packed")


def test_one_module_under_two_names_is_one_site_and_stays_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    quantized = fewbit.quantize(model, ALL)
    assert list(fewbit.plan_of(quantized).sites) == ["a"]
    assert quantized.get_submodule("a") is quantized.get_submodule("b")


def test_integer_weights_are_skipped() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    plan = make_plan(model, ALL)
    assert list(plan.sites) == ["a"] and "not floating point" in plan.skipped["b"]


def test_parametrized_layers_are_named_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    plan = make_plan(model, ALL)
    assert set(plan.sites) | set(plan.skipped) == {"0", "1"}
