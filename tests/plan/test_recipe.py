"""Recipes: presets, TOML files, patterns, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit import PER_TOKEN, PlanError, QuantSpec, Recipe, Rule, Scheme, load_recipe, per_channel

INT8 = Scheme(QuantSpec("int8", per_channel(0)))
PRESETS = [
    *("int4-compact", "int4-dynamic", "int4-gptq", "int4-int4-static", "int4-static", "int4-symmetric"),
    *("int4-weight-only", "int8-dynamic", "int8-static"),
]
RULE: dict[str, Any] = {"pattern": "*", "scheme": {"weight": {"format": "int8"}}}


def test_presets() -> None:
    assert fewbit.presets() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_survive_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.needs_calibration == name.endswith("-static")
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json())), "recipe") == recipe
    assert load_recipe(recipe) is recipe


def test_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\n[[rules]]\npattern = "type:Linear"\nmin_weights = 7\nmin_channels = 5\n[rules.scheme]\n'
        'weight = { format = "int8", granularity = { channel = 0 } }\n'
        'input = { format = "int8", granularity = "token" }\n'
        '[[rules]]\npattern = "head"\n'
    )
    scheme = Scheme(INT8.weight, QuantSpec("int8", PER_TOKEN))
    expected = Recipe("mine", (Rule("type:Linear", scheme, min_weights=7, min_channels=5), Rule("head", None)))
    assert load_recipe(file) == load_recipe(str(file)) == expected


@pytest.mark.parametrize(
    ("pattern", "name", "kind", "matches"),
    [
        ("*", "", "Linear", True),
        ("layers.*.dense", "layers.0.dense", "Linear", True),
        ("layers.*.dense", "layers.0.dense.extra", "Linear", False),
        ("layers.?", "layers.1", "Linear", True),
        ("Layers.1", "layers.1", "Linear", False),
        ("type:Linear", "x", "Linear", True),
        ("type:LSTM|GRU", "x", "GRU", True),
        ("type:Line", "x", "Linear", False),
        (r"re:layers\.[0-3]", "layers.2", "Linear", True),
        (r"re:layers\.[0-3]", "layers.22", "Linear", False),
    ],
)
def test_patterns(pattern: str, name: str, kind: str, matches: bool) -> None:
    assert Rule(pattern, None).matches(name, kind) == matches


def test_override_and_exclude_come_first() -> None:
    recipe = Recipe("test", (Rule("*", INT8),))
    assert recipe.override("head", None).rules == (Rule("head", None), Rule("*", INT8))
    assert [rule.pattern for rule in load_recipe(recipe, ["a", "b"]).rules] == ["b", "a", "*"]
    assert recipe.rules == (Rule("*", INT8),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "here: found list"),
        ({"rules": []}, "here: key 'name' is missing"),
        ({"name": "x"}, "here: key 'rules' is missing"),
        ({"name": 3, "rules": []}, "here.name: found 3, needs a str"),
        ({"name": "x", "rules": {}}, "here.rules: found {}, needs a list"),
        ({"name": "x", "rules": [], "rulez": []}, "here: unknown key 'rulez'. Did you mean 'rules'?"),
        ({"name": "x", "rules": [RULE, 3]}, r"here.rules\[1\]: found int"),
        ({"name": "x", "rules": [{}]}, r"here.rules\[0\]: key 'pattern' is missing"),
        ({"name": "x", "rules": [{"pattern": 1}]}, r"here.rules\[0\].pattern: found 1, needs a str"),
        (
            {"name": "x", "rules": [{**RULE, "min_weights": "9"}]},
            r"here.rules\[0\].min_weights: found '9', needs a int",
        ),
        (
            {"name": "x", "rules": [{**RULE, "min_channels": 1.5}]},
            r"here.rules\[0\].min_channels: found 1.5, needs a int",
        ),
        ({"name": "x", "rules": [{**RULE, "optional": 1}]}, r"here.rules\[0\].optional: found 1, needs a bool"),
        ({"name": "x", "rules": [{"pattern": "*", "scheme": {}}]}, r"here.rules\[0\].scheme: key 'weight' is missing"),
        (
            {"name": "x", "rules": [{"pattern": "*", "scheme": {"weight": {"format": "int9"}}}]},
            r"here.rules\[0\].scheme.weight: unknown format 'int9'. Did you mean 'int",
        ),
        (
            {"name": "x", "rules": [{"pattern": "*", "scheme": {"weight": {"format": "int8", "granularity": "row"}}}]},
            r"here.rules\[0\].scheme.weight.granularity: found 'row'",
        ),
        (
            {"name": "x", "rules": [{"pattern": "*", "scheme": {**RULE["scheme"], "method": "rtm"}}]},
            r"rules\[0\]: unknown method 'rtm'. Did you mean 'rtn'\?",
        ),
        (
            {
                "name": "x",
                "rules": [
                    {"pattern": "*", "scheme": {**RULE["scheme"], "input": {"format": "int8", "observer": "minmix"}}}
                ],
            },
            r"rules\[0\]: unknown observer 'minmix'. Did you mean 'minmax'\?",
        ),
        ({"name": "x", "rules": [{"pattern": "re:("}]}, r"rules\[0\]: 're:\(' is not a regular expression"),
        (
            {"name": "x", "rules": [], "transforms": ["fold_batchnorm"]},
            "unknown transform 'fold_batchnorm'. Did you mean 'fold_batch_norm'",
        ),
    ],
    ids=str,
)
def test_errors_name_the_place(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe.from_json(data, "here")


def test_unknown_preset() -> None:
    with pytest.raises(PlanError, match=r"unknown recipe 'int8-dinamic'. Did you mean 'int8-dynamic'"):
        load_recipe("int8-dinamic")


def test_missing_and_invalid_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none.toml: cannot be read"):
        load_recipe(tmp_path / "none.toml")
    file = tmp_path / "bad.toml"
    file.write_text("name = ")
    with pytest.raises(PlanError, match=r"bad.toml: not valid TOML"):
        load_recipe(file)
    file.write_text('name = "x"')
    with pytest.raises(PlanError, match=r"bad.toml: key 'rules' is missing"):
        load_recipe(file)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes('name = "caf\xe9"\n'.encode("latin-1"))
    with pytest.raises(PlanError, match=r"latin.toml: "):
        load_recipe(file)


def test_exclude_takes_one_pattern_as_it_is() -> None:
    recipe = load_recipe(Recipe("test", (Rule("*", INT8),)), "head")
    assert [rule.pattern for rule in recipe.rules] == ["head", "*"]


RESULTS = QuantSpec("uint8", symmetric=False, observer="mse")


def test_results_and_correction_in_json() -> None:
    recipe = Recipe("x", (), results=RESULTS, correction="bias")
    data = recipe.to_json()
    assert data["correction"] == "bias" and data["results"] == {
        "format": "uint8",
        "granularity": "tensor",
        "symmetric": False,
        "observer": "mse",
        "scale": None,
        "scale_dtype": "float32",
    }
    assert Recipe.from_json(json.loads(json.dumps(data)), "here") == recipe
    assert {"results", "correction"}.isdisjoint(Recipe("x", ()).to_json())
    static = load_recipe("int8-static")
    assert (static.results, static.correction) == (RESULTS, "affine")


def test_results_and_correction_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nrules = []\ncorrection = "affine"\n'
        'results = { format = "uint8", symmetric = false, observer = "mse" }\n'
    )
    assert load_recipe(file) == Recipe("mine", (), results=RESULTS, correction="affine")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"correction": "affin"}, "recipe 'x': unknown correction 'affin'. Did you mean 'affine'"),
        ({"correction": True}, "here.correction: found True, needs a str"),
        ({"results": None}, "here.results: found NoneType, needs a table"),
        ({"results": "uint8"}, "here.results: found str, needs a table"),
        ({"results": {"format": "uint9"}}, "here.results: unknown format 'uint9'. Did you mean 'uint8'"),
        ({"results": {"format": "uint8"}}, "here.results: format 'uint8' has no negative values"),
        (
            {"results": {"format": "uint8", "symmetric": False}},
            "recipe 'x': results: found 'uint8', observer None; engines need 'uint8' and an observer",
        ),
        (
            {"results": {"format": "int8", "observer": "mse"}},
            "recipe 'x': results: found 'int8', observer 'mse'; engines need 'uint8'",
        ),
        (
            {"results": {"format": "uint8", "symmetric": False, "observer": "mean_squared"}},
            "recipe 'x': results: unknown observer 'mean_squared'",
        ),
    ],
    ids=str,
)
def test_errors_of_results_and_correction(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe.from_json({"name": "x", "rules": [], **values}, "here")


def test_ends_need_a_static_input() -> None:
    recipe = load_recipe("int4-static")
    assert recipe.ends is not None and recipe.ends.weight.format == "int8"
    data = recipe.to_json()
    data["ends"]["input"] = None
    with pytest.raises(PlanError, match="ends needs an input with an observer"):
        Recipe.from_json(data, "recipe")
