"""QuantSpec and Scheme: the JSON form and what is refused, with the place in the message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import PlanError
from fewbit.spec import (
    PER_TENSOR,
    PER_TOKEN,
    SCALE_DTYPES,
    Granularity,
    QuantSpec,
    Scheme,
    per_channel,
    per_group,
)

SETTINGS = settings(max_examples=50)

granularities = st.one_of(
    st.just(PER_TENSOR),
    st.just(PER_TOKEN),
    st.integers(-3, 3).map(per_channel),
    st.integers(1, 256).map(per_group),
)


@st.composite
def specs(draw: st.DrawFn, two_levels: bool = True, static: bool = True) -> QuantSpec:
    """Any spec that is allowed."""
    kinds = [("int8", True), ("int8", False), ("uint8", False), ("int4", True), ("int4", False), ("nf4", True)]
    name, symmetric = draw(st.sampled_from(kinds))
    granularity = draw(granularities)
    observer = draw(st.sampled_from([None, "minmax", "mse"])) if static and granularity == PER_TENSOR else None
    scale = draw(st.none() | specs(two_levels=False, static=False)) if two_levels else None
    return QuantSpec(name, granularity, symmetric, observer, scale, draw(st.sampled_from(SCALE_DTYPES)))


@SETTINGS
@given(specs())
def test_every_spec_survives_json(spec: QuantSpec) -> None:
    assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json())), "spec") == spec


@SETTINGS
@given(specs(static=False), st.none() | specs(), st.sampled_from(["rtn", "mse"]))
def test_every_scheme_survives_json(weight: QuantSpec, spec: QuantSpec | None, method: str) -> None:
    scheme = Scheme(weight, spec, method)
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json())), "scheme") == scheme


def test_json_leaves_out_what_has_its_default() -> None:
    assert QuantSpec.from_json({"format": "int8"}, "spec") == QuantSpec("int8")
    assert Scheme.from_json({"weight": {"format": "int8"}}, "scheme") == Scheme(QuantSpec("int8"))


@pytest.mark.parametrize(
    ("granularity", "data"),
    [(PER_TENSOR, "tensor"), (PER_TOKEN, "token"), (per_channel(1), {"channel": 1}), (per_group(32), {"group": 32})],
    ids=["tensor", "token", "channel", "group"],
)
def test_json_of_a_granularity(granularity: Granularity, data: object) -> None:
    assert granularity.to_json() == data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"formt": "int8"}, ["unknown key 'formt'", "Did you mean 'format'?"]),
        ({"format": 8}, ["p.format", "8", "needs a str"]),
        ({"format": None}, ["p.format", "None", "needs a str"]),
        ({"format": "in8"}, ["unknown format 'in8'", "Did you mean 'int8'?"]),
        ({"symmetric": "yes"}, ["p.symmetric", "'yes'", "needs a bool"]),
        ({"symmetric": 1}, ["p.symmetric", "1", "needs a bool"]),
        ({"symmetric": False, "format": "nf4"}, ["'nf4'", "symmetric = true"]),
        ({"format": "uint8"}, ["'uint8'", "symmetric = false"]),
        ({"scale_dtype": "float16"}, ["unknown scale_dtype 'float16'", "bfloat16"]),
        ({"scale_dtype": None}, ["p.scale_dtype", "None", "needs a str"]),
        ({"observer": 3}, ["p.observer", "3", "needs a str"]),
        ({"observer": "minmax", "granularity": "token"}, ["'minmax'", "'tensor'", "'token'"]),
        ({"observer": "minmax", "granularity": {"channel": 0}}, ["'minmax'", "'tensor'", "'channel'"]),
        ({"observer": "minmax", "granularity": {"group": 8}}, ["'minmax'", "'tensor'", "'group'"]),
        ({"granularity": "tensr"}, ["p.granularity", "'tensr'", "'tensor'"]),
        ({"granularity": "group"}, ["p.granularity", "'group'", "{'group': size}"]),
        ({"granularity": None}, ["p.granularity", "None"]),
        ({"granularity": ["tensor"]}, ["p.granularity", "['tensor']"]),
        ({"granularity": {"group": "32"}}, ["p.granularity", "'32'"]),
        ({"granularity": {"group": 32.0}}, ["p.granularity", "32.0"]),
        ({"granularity": {"group": 0}}, ["p.granularity", "group_size >= 1"]),
        ({"granularity": {"group": True}}, ["p.granularity", "True"]),
        ({"granularity": {"channel": False}}, ["p.granularity", "False"]),
        ({"granularity": {"rows": 1}}, ["p.granularity", "rows"]),
        ({"granularity": {"group": 32, "channel": 0}}, ["p.granularity", "32"]),
        ({"granularity": {}}, ["p.granularity", "{}"]),
        ({"scale": "int8"}, ["p.scale", "found str"]),
        ({"scale": {}}, ["p.scale", "'format' is missing"]),
        ({"scale": {"format": "int8", "bits": 8}}, ["p.scale", "unknown key 'bits'"]),
        ({"scale": {"format": "int8", "observer": "minmax"}}, ["observer = None"]),
        ({"scale": {"format": "uint8"}}, ["p.scale", "'uint8'", "symmetric = false"]),
        ({"scale": {"format": "int8", "granularity": "rows"}}, ["p.scale.granularity", "'rows'"]),
    ],
    ids=str,
)
def test_a_wrong_spec_is_refused_with_its_place(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as raised:
        QuantSpec.from_json({"format": "int8", **change}, "p")
    message = str(raised.value)
    assert message.startswith("p")
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("data", [None, "int8", ["int8"], 8], ids=str)
def test_a_spec_that_is_no_table_is_refused(data: object) -> None:
    with pytest.raises(PlanError, match=r"^plan\.input: found .*needs a table of QuantSpec fields"):
        QuantSpec.from_json(data, "plan.input")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["p: key 'weight' is missing"]),
        ({"weight": None}, ["p.weight"]),
        ({"weight": {"format": "int7"}}, ["p.weight", "unknown format 'int7'"]),
        ({"weight": {"format": "int8"}, "input": {"format": 1}}, ["p.input.format"]),
        ({"weight": {"format": "int8"}, "method": 1}, ["p.method", "needs a str"]),
        ({"weight": {"format": "int8"}, "method": None}, ["p.method", "needs a str"]),
        ({"weight": {"format": "int8"}, "inputs": None}, ["unknown key 'inputs'", "Did you mean 'input'?"]),
        ({"weight": {"format": "int8", "observer": "minmax"}}, ["p", "weight", "observer = None"]),
    ],
    ids=str,
)
def test_a_wrong_scheme_is_refused_with_its_place(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PlanError) as raised:
        Scheme.from_json(data, "p")
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_has_at_least_one_element(size: int) -> None:
    with pytest.raises(PlanError, match=f"group_size >= 1, found {size}"):
        per_group(size)


def test_an_unknown_granularity_gets_a_suggestion() -> None:
    with pytest.raises(PlanError, match="Did you mean 'channel'"):
        Granularity("chanel")  # type: ignore[arg-type]


def test_a_static_spec_is_one_with_an_observer() -> None:
    assert QuantSpec("int8", observer="minmax").is_static
    assert not QuantSpec("int8").is_static
