"""Damaged checkpoints: a clear error, never a wrong model."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fewbit
from fewbit import PER_TOKEN, CheckpointError, QuantSpec, Recipe, Rule, Scheme, per_channel

FILES = ("model.safetensors", "plan.json")
ALL = Recipe("all", (Rule("*", Scheme(QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN))),))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the JSON header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(saved: tuple[Path, nn.Module, nn.Module], name: str) -> None:
    folder, model, _ = saved
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"out/{name}: no such file"):
        fewbit.load(folder, model)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/model.safetensors: no such file"):
        fewbit.load(tmp_path / "nowhere", nn.Linear(2, 2))


@pytest.mark.parametrize("content", [b"", b"x", b"{}", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 100], ids=repr)
def test_file_that_is_not_safetensors(saved: tuple[Path, nn.Module, nn.Module], content: bytes) -> None:
    folder, model, _ = saved
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged or not a safetensors file"):
        fewbit.load(folder, model)


def test_foreign_safetensors_file(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, _ = saved
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: metadata 'fewbit' is None"):
        fewbit.load(folder, model)


def test_plan_of_another_model(saved: tuple[Path, nn.Module, nn.Module], tmp_path: Path) -> None:
    folder, model, _ = saved
    other = fewbit.save(fewbit.quantize(nn.Linear(4, 4), ALL), tmp_path / "other")
    (folder / "plan.json").write_bytes((other / "plan.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"plan.json: damaged, or not the plan that model.safetensors"):
        fewbit.load(folder, model)


@pytest.mark.parametrize("aliases", ["", "[]", "{", '{"a": "nowhere"}'], ids=repr)
def test_damaged_aliases(saved: tuple[Path, nn.Module, nn.Module], aliases: str) -> None:
    folder, model, _ = saved
    edit_header(folder / "model.safetensors", lambda header: header["__metadata__"].update(aliases=aliases))
    with pytest.raises(CheckpointError, match="metadata 'aliases' is damaged"):
        fewbit.load(folder, model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4)), r"plan.sites.0: needs weights"),
        (nn.Sequential(nn.Conv1d(16, 8, 1), nn.ReLU(), nn.Linear(8, 4)), "plan.sites.0: needs a Linear, found Conv1d"),
        (nn.Sequential(nn.Linear(16, 8)), "plan.sites.2: needs a Linear, found no such layer in this Sequential"),
        (
            nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)),
            r"model.safetensors: does not fit the model given: missing \['3.bias', '3.weight'\]",
        ),
        (
            nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)),
            r"missing nothing, unexpected \['0.bias'\]",
        ),
        (
            nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(torch.bfloat16),
            r"model.safetensors: 0.bias: found torch.float32 \[8\], needs torch.bfloat16 \[8\]",
        ),
    ],
    ids=["other-shape", "other-layer", "fewer-layers", "more-layers", "no-bias", "other-dtype"],
)
def test_model_that_does_not_fit(saved: tuple[Path, nn.Module, nn.Module], model: nn.Module, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        fewbit.load(saved[0], model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_wrong_shape_in_the_file_is_named(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, _ = saved
    path = folder / "model.safetensors"
    edit_header(path, lambda header: header["0.weight_packed"].update(shape=[4, 32]))
    with pytest.raises(
        CheckpointError, match=r"0.weight_packed: found torch.int8 \[4, 32\], needs torch.int8 \[8, 16\]"
    ):
        fewbit.load(folder, model)


def load_or_refuse(folder: Path, model: nn.Module) -> bool:
    """Whether it loads; anything but CheckpointError is a failure of the test."""
    try:
        fewbit.load(folder, model)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_random_damage_raises_nothing_but_checkpoint_errors(
    saved: tuple[Path, nn.Module, nn.Module], name: str
) -> None:
    folder, model, quantized = saved
    path, chance = folder / name, random.Random(0)
    good = path.read_bytes()
    data = 8 + struct.unpack("<Q", good[:8])[0] if name == FILES[0] else len(good)
    expected = quantized.state_dict()
    for turn in range(300):
        content, place = bytearray(good), chance.randrange(len(good))
        kind = turn % 4
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place : place + chance.randrange(1, 20)]
        else:
            content[place:place] = chance.randbytes(chance.randrange(1, 20))
        path.write_bytes(content)
        if load_or_refuse(folder, model):
            # A flip in a tensor's data, or in a header's white space, changes no name, shape or dtype.
            loaded = fewbit.load(folder, model).state_dict()
            assert kind == 0 and name == FILES[0]
            assert place >= data or all(torch.equal(loaded[key], expected[key]) for key in expected)


def paths_in(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [prefix, *(path for key, value in items for path in paths_in(value, (*prefix, key)))]


def sign_plan(folder: Path) -> None:
    """Make the model file name the plan as it is now."""
    digest = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    edit_header(folder / "model.safetensors", lambda header: header["__metadata__"].update(plan=digest))


def mutated(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value == "delete":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize("kind", ["linear", "cnn"])
def test_changed_plans_raise_nothing_but_checkpoint_errors(
    kind: str, cnn: nn.Module, images: list[Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if kind == "cnn":
        model = cnn
        quantized = fewbit.quantize(model, "int8-static", images)
    else:
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        quantized = fewbit.quantize(model, ALL)
    folder = fewbit.save(quantized, tmp_path)
    good = json.loads((folder / "plan.json").read_text())
    chance = random.Random(0)
    values = ["delete", None, True, -1, 10**30, 0.5, "x", [], {}, [[]], {"x": 1}]
    paths = paths_in(good)
    refused = 0
    for turn in range(250):
        path = paths[turn % len(paths)]
        value = chance.choice(values)
        if not path and value == "delete":
            continue
        (folder / "plan.json").write_text(json.dumps(mutated(good, path, value)))
        sign_plan(folder)
        refused += not load_or_refuse(folder, model)
    assert refused > 100
    (folder / "plan.json").write_text(json.dumps(good))
    sign_plan(folder)
    assert load_or_refuse(folder, model)


def test_changed_headers_raise_nothing_but_checkpoint_errors(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, _ = saved
    path, chance = folder / "model.safetensors", random.Random(0)
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    values = ["delete", None, True, -1, 2**62, 0.5, "F32", "I8", "F64", [], {}, [1, 2], [0, 0]]
    paths = [found for found in paths_in(header) if found]
    for turn in range(300):
        path.write_bytes(good)
        changed = mutated(header, paths[turn % len(paths)], chance.choice(values))

        def change(data: dict[str, Any], changed: Any = changed) -> None:
            data.clear()
            data.update(changed)

        edit_header(path, change)
        load_or_refuse(folder, model)
    path.write_bytes(good)
    assert load_or_refuse(folder, model)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipe", "transforms"), [[]], r"plan.json: plan.recipe"),
        (("recipe", "transforms"), [1], r"plan.json: plan.recipe"),
        (("ties",), [1], r"plan.json: plan.ties\[0\]: found 1, needs a list of names"),
        (("ties",), [[1]], r"plan.json: plan.ties\[0\]: found \[1\], needs a list of names"),
    ],
    ids=str,
)
def test_a_signed_plan_of_wrong_types(
    saved: tuple[Path, nn.Module, nn.Module], path: tuple[str, ...], value: Any, message: str
) -> None:
    folder, model, _ = saved
    file = folder / "plan.json"
    file.write_text(json.dumps(mutated(json.loads(file.read_text()), path, value)))
    sign_plan(folder)
    with pytest.raises(CheckpointError, match=message):
        fewbit.load(folder, model)


def test_a_signed_plan_that_is_not_utf8(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, _ = saved
    (folder / "plan.json").write_bytes(b'{"version": "\xff"}')
    sign_plan(folder)
    with pytest.raises(CheckpointError, match=r"plan.json: not UTF-8 text"):
        fewbit.load(folder, model)


def test_deeply_nested_plan(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, _ = saved
    (folder / "plan.json").write_text("[" * 100_000)
    sign_plan(folder)
    with pytest.raises(CheckpointError, match=r"plan.json: not valid JSON"):
        fewbit.load(folder, model)
