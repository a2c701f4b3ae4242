"""Plans: their JSON, sizes, shares and summaries."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import Plan, PlanError, QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.plan import Site
from fewbit.targets import saved_bytes

GOLDEN = {
    "version": 1,
    "recipe": {
        "name": "golden",
        "rules": [
            {
                "pattern": "type:Linear",
                "scheme": {
                    "weight": {
                        "format": "int8",
                        "granularity": {"channel": 0},
                        "symmetric": True,
                        "observer": None,
                        "scale": None,
                        "scale_dtype": "float32",
                    },
                    "input": None,
                    "method": "rtn",
                },
                "min_weights": 20,
                "min_channels": 0,
                "optional": False,
            }
        ],
        "transforms": [],
    },
    "transforms": {},
    "sites": {
        "0": {
            "type": "Linear",
            "weights": {"weight": [8, 4]},
            "scheme": {
                "weight": {
                    "format": "int8",
                    "granularity": {"channel": 0},
                    "symmetric": True,
                    "observer": None,
                    "scale": None,
                    "scale_dtype": "float32",
                },
                "input": None,
                "method": "rtn",
            },
        }
    },
    "skipped": {"1": "too small to gain: fewer than 20 weights"},
    "ties": [],
    "results": {},
    "float_weights": 8 + 16 + 2,
}


def golden_plan() -> Plan:
    scheme = Scheme(QuantSpec("int8", per_channel(0)))
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    return fewbit.make_plan(model, Recipe("golden", (Rule("type:Linear", scheme, min_weights=20),)))


def test_golden_json() -> None:
    data = golden_plan().to_json()
    assert data.pop("float_bytes") >= 4 * (8 + 16 + 2)
    assert data == GOLDEN


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int4-weight-only"])
def test_presets_plans_survive_json(encoder: nn.Module, recipe: str) -> None:
    plan = fewbit.plan_of(fewbit.quantize(encoder, recipe))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_static_plan_survives_json(cnn: nn.Module, images: list[Tensor]) -> None:
    plan = fewbit.plan_of(fewbit.quantize(cnn, "int8-static", images))
    assert plan.transforms and Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_golden_results() -> None:
    plan = replace(golden_plan(), results={"layer.0:conv2d": (0.5, 128), ":add.1": (0.25, 0)})
    data = json.loads(json.dumps(plan.to_json()))
    assert data["results"] == {"layer.0:conv2d": [0.5, 128], ":add.1": [0.25, 0]}
    assert Plan.from_json(data) == plan


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


SITE = ("sites", "0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", value=2), "plan.version: found 2"),
        (_set("extra", value=1), "plan: unknown key 'extra'"),
        (lambda data: data.pop("ties"), "plan: key 'ties' is missing"),
        (_set("sites", value=[]), r"plan.sites: found \[\], needs a dict"),
        (_set("skipped", value=3), "plan.skipped: found 3, needs a dict"),
        (_set("transforms", value=[]), r"plan.transforms: found \[\], needs a dict"),
        (_set("ties", value={}), "plan.ties: found {}, needs a list"),
        (_set("float_weights", value="9"), "plan.float_weights: found '9', needs a int"),
        (_set("float_bytes", value=None), "plan.float_bytes: found None, needs a int"),
        (_set("results", value=[]), r"plan.results: found \[\], needs a dict"),
        (_set("results", "a:add", value=[0.5]), r"plan.results.a:add: found \[0.5\], needs \[scale, zero point\]"),
        (_set("results", "a:add", value=0.5), "plan.results.a:add: found 0.5"),
        (_set("results", "a:add", value=[0.0, 3]), r"plan.results.a:add: found \[0.0, 3\]"),
        (_set("results", "a:add", value=[0.5, 3.0]), r"plan.results.a:add: found \[0.5, 3.0\]"),
        (_set("results", "a:add", value=[0.5, True]), r"plan.results.a:add: found \[0.5, True\]"),
        (_set("results", "a:add", value=[0.5, 256]), r"plan.results.a:add: found \[0.5, 256\]"),
        (_set("results", "a:add", value=[0.5, -1]), r"plan.results.a:add: found \[0.5, -1\]"),
        (_set("results", "a:add", value=[float("inf"), 3]), r"plan.results.a:add: found \[inf, 3\]"),
        (_set("results", "a:add", value=[float("nan"), 3]), r"plan.results.a:add: found \[nan, 3\]"),
        (_set("recipe", value=None), "plan.recipe: found NoneType"),
        (_set("recipe", "rules", 0, "patern", value="x"), r"plan.recipe.rules\[0\]: unknown key 'patern'"),
        (_set(*SITE, value=3), "plan.sites.0: found int"),
        (_set(*SITE, "type", value=None), "plan.sites.0.type: found None, needs a str"),
        (_set(*SITE, "weights", value=[]), "plan.sites.0.weights: found"),
        (_set(*SITE, "weights", "weight", value=[8]), r"plan.sites.0.weights.weight: found \[8\]"),
        (_set(*SITE, "weights", "weight", value=[8, -1]), "plan.sites.0.weights.weight: found"),
        (_set(*SITE, "weights", "weight", value=[8, "4"]), "plan.sites.0.weights.weight: found"),
        (_set(*SITE, "scheme", value={}), "plan.sites.0.scheme: key 'weight' is missing"),
        (_set(*SITE, "scheme", "method", value="x"), "plan.sites.0.scheme: unknown method 'x'"),
        (_set(*SITE, "scheme", "weight", "symmetric", value=1), "plan.sites.0.scheme.weight.symmetric: found 1"),
        (_set(*SITE, "scheme", "weight", "format", value="x"), "plan.sites.0.scheme.weight: unknown format 'x'"),
        (
            _set(*SITE, "scheme", "weight", "granularity", value={"group": "8"}),
            "plan.sites.0.scheme.weight.granularity",
        ),
        (_set(*SITE, "scheme", "weight", "granularity", value={"group": 0}), "group_size >= 1"),
    ],
)
def test_errors_name_the_place(change: Callable[[Any], None], message: str) -> None:
    data = copy.deepcopy(golden_plan().to_json())
    change(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3], ids=str)
def test_what_is_not_a_mapping_is_refused(data: Any) -> None:
    with pytest.raises(PlanError, match=r"plan.version"):
        Plan.from_json(data)


def test_site_counts_weights_and_bytes() -> None:
    spec = QuantSpec("int4", fewbit.per_group(32), scale_dtype="bfloat16")
    site = Site("Linear", {"weight": (10, 64)}, Scheme(spec))
    assert site.count == 640 and site.nbytes == 320 + 10 * 2 * 2


def test_share_and_summary() -> None:
    plan = golden_plan()
    assert plan.share == 32 / (32 + 26)
    assert plan.summary().splitlines() == [
        "quantized 1 of 2 layers, 55.2 % of the weights",
        "skipped 1: too small to gain: fewer than 20 weights",
    ]


def test_what_could_not_be_read_is_in_the_summary_but_no_layer() -> None:
    skipped = {"transform fold_batch_norm": "it does not export", "values between layers": "it does not export"}
    plan = replace(golden_plan(), skipped={**golden_plan().skipped, **skipped})
    lines = plan.summary().splitlines()
    assert lines[0].startswith("quantized 1 of 2 layers")
    assert lines[-1] == "skipped transform fold_batch_norm, values between layers: it does not export"


def test_summary_shortens_long_lists_of_layers() -> None:
    scheme = Scheme(QuantSpec("int8", per_channel(0)))
    model = nn.Sequential(nn.Linear(64, 64), *(nn.Linear(2, 2) for _ in range(5)))
    plan = fewbit.make_plan(model, Recipe("test", (Rule("*", scheme, min_weights=100),)))
    assert "skipped 1, 2, 3 and 2 more: too small to gain" in plan.summary()


def large_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 400), nn.ReLU(), nn.Linear(400, 512), nn.Linear(512, 10))


def large_lstm() -> nn.Module:
    return nn.Sequential(nn.Embedding(1000, 128), nn.LSTM(128, 160, num_layers=2))


def large_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 128, 3),
        nn.BatchNorm2d(128),
        nn.Conv2d(128, 160, 3),
    )


@pytest.mark.parametrize(
    ("make", "recipe", "batch"),
    [
        (large_mlp, "int8-dynamic", None),
        (large_mlp, "int4-weight-only", None),
        (large_lstm, "int8-dynamic", None),
        (large_cnn, "int8-static", torch.zeros(1, 3, 8, 8)),
    ],
    ids=["mlp-int8", "mlp-int4", "lstm-int8", "cnn-static"],
)
def test_predicted_size_is_within_two_percent(
    make: Callable[[], nn.Module], recipe: str, batch: Tensor | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) >= 200_000
    quantized = fewbit.quantize(model, recipe, None if batch is None else [batch])
    actual = saved_bytes(fewbit.save(quantized, tmp_path))
    assert abs(fewbit.plan_of(quantized).nbytes - actual) <= 0.02 * actual
