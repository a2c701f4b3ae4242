"""fewbit's checkpoint: bit-equal after loading, whole after interruptions, and clear about damage."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fewbit
from fewbit import PER_TOKEN, CheckpointError, PlanError, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.targets import saved_bytes, tensor_bytes

FILES = ("model.safetensors", "plan.json")
SCHEME = Scheme(QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN))
ALL = Recipe("all", (Rule("*", SCHEME),))

# Built in this process and in a fresh one; float weights are random in both.
BUILD = """
from torch import nn

class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]

def build(kind):
    if kind == "cnn":
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5),
        ).eval()
    if kind == "lstm":
        return nn.Sequential(
            nn.Embedding(300, 64), nn.LSTM(64, 48, bidirectional=True, batch_first=True), Last(), nn.Linear(96, 512)
        ).eval()
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.Sequential(nn.Embedding(200, 128), nn.TransformerEncoder(layer, 2)).eval()
"""
CASES = {"cnn": "int8-static", "lstm": "int8-dynamic", "encoder": "int4-weight-only"}
space: dict[str, Any] = {}
exec(BUILD, space)
build: Callable[[str], nn.Module] = space["build"]


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 3, 8, 8, generator=generator)
        if kind == "cnn"
        else torch.randint(0, 200, (2, 6), generator=generator)
    )


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return fewbit.quantize(build(kind), CASES[kind], [inputs(kind)])


def assert_same(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, nn.Module]:
    """A folder, the float model and the quantized one in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    quantized = fewbit.quantize(model, ALL)
    return fewbit.save(quantized, tmp_path / "out"), model, quantized


@pytest.mark.parametrize("kind", CASES)
def test_loads_bit_equal_into_a_model_built_alike_or_on_meta(kind: str, tmp_path: Path) -> None:
    quantized = made(kind)
    fewbit.save(quantized, tmp_path)
    with torch.device("meta"):
        meta = build(kind)
    for model in (build(kind), meta):
        before = {name: (id(tensor), tensor.is_meta) for name, tensor in model.state_dict(keep_vars=True).items()}
        loaded = fewbit.load(tmp_path, model)
        assert_same(loaded, quantized, inputs(kind))
        assert fewbit.plan_of(loaded) == fewbit.plan_of(quantized)
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        assert not loaded.training
        after = {name: (id(tensor), tensor.is_meta) for name, tensor in model.state_dict(keep_vars=True).items()}
        assert before == after


@pytest.mark.parametrize("kind", CASES)
def test_fresh_process_gives_bit_equal_outputs(kind: str, tmp_path: Path) -> None:
    quantized = made(kind)
    fewbit.save(quantized, tmp_path / "out")
    x = inputs(kind)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = f"""{BUILD}
import sys
import torch
from safetensors.torch import load_file, save_file
import fewbit
model = fewbit.load(sys.argv[1] + "/out", build({kind!r}))
with torch.no_grad():
    save_file({{"y": model(load_file(sys.argv[1] + "/x.safetensors")["x"])}}, sys.argv[1] + "/y.safetensors")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], quantized(x))


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = fewbit.save(made("cnn"), tmp_path / "a"), fewbit.save(made("cnn"), tmp_path / "b")
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_model_is_saved_and_loaded_again(saved: tuple[Path, nn.Module, nn.Module], tmp_path: Path) -> None:
    folder, model, quantized = saved
    again = fewbit.load(fewbit.save(fewbit.load(folder, model), tmp_path / "again"), model)
    assert_same(again, quantized, torch.randn(3, 16))


def test_a_checkpoint_may_be_replaced_by_the_model_loaded_from_it(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, quantized = saved
    fewbit.save(fewbit.load(folder, model), folder)
    assert_same(fewbit.load(folder, model), quantized, torch.randn(3, 16))


def test_no_other_files_are_left(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, _, quantized = saved
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    fewbit.save(quantized, folder, {"measured": 1})
    assert sorted(file.name for file in folder.iterdir()) == sorted([*FILES, "report.json"])
    assert json.loads((folder / "report.json").read_text()) == {"measured": 1}


def test_sizes(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, quantized = saved
    assert saved_bytes(folder) == (folder / "model.safetensors").stat().st_size
    assert tensor_bytes(model) == 4 * (16 * 8 + 8 + 8 * 4 + 4)
    assert tensor_bytes(quantized) == 16 * 8 + 8 * 4 + 4 * (8 + 4) + 4 * (8 + 4)


class Tied(nn.Module):
    """Tied weights, a module under two names, a tied bias, and buffers that state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.again = self.middle
        self.norm = nn.LayerNorm(8)
        self.other_norm = nn.LayerNorm(8)
        self.other_norm.weight = self.norm.weight
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.randn(8), persistent=False)
        self.register_buffer("same_steps", self.steps, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.middle(self.embedding(tokens)) + self.get_buffer("steps")
        return self.head(self.other_norm(self.norm(self.again(x))))


@pytest.mark.parametrize("meta", [False, True], ids=["built-alike", "meta"])
def test_ties_are_one_object_again_and_buffers_are_restored(tmp_path: Path, meta: bool) -> None:
    torch.manual_seed(0)
    quantized = fewbit.quantize(Tied(), ALL)
    fewbit.save(quantized, tmp_path)
    with torch.device("meta" if meta else "cpu"):
        model = Tied()
    loaded = fewbit.load(tmp_path, model)
    assert_same(loaded, quantized, torch.tensor([[1, 2, 3]]))
    assert loaded.get_submodule("middle") is loaded.get_submodule("again")
    assert loaded.get_buffer("embedding.weight_packed") is loaded.get_buffer("head.weight_packed")
    assert loaded.get_parameter("norm.weight") is loaded.get_parameter("other_norm.weight")
    assert torch.equal(loaded.get_buffer("steps"), quantized.get_buffer("steps"))
    assert loaded.get_buffer("steps") is loaded.get_buffer("same_steps")
    stored = load_file(tmp_path / "model.safetensors")
    assert ("embedding.weight_packed" in stored) != ("head.weight_packed" in stored)


def test_tied_float_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = fewbit.quantize(Tied(), Recipe("test", (Rule("middle", SCHEME),)))
    loaded = fewbit.load(fewbit.save(quantized, tmp_path), Tied())
    assert loaded.get_parameter("embedding.weight") is loaded.get_parameter("head.weight")
    assert_same(loaded, quantized, torch.tensor([[1, 2, 3]]))


def test_frozen_parameters_stay_as_in_the_model_given(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, _ = saved
    model[0].bias.requires_grad_(False)
    loaded = fewbit.load(folder, model)
    assert not loaded.get_parameter("0.bias").requires_grad and loaded.get_parameter("2.bias").requires_grad


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", per_group(5), symmetric=False, scale_dtype="bfloat16"),
        QuantSpec("nf4", per_group(8), scale=QuantSpec("uint8", per_group(2), symmetric=False)),
        QuantSpec("uint8", symmetric=False),
    ],
    ids=["int4-asymmetric", "nf4-two-level", "uint8-per-tensor"],
)
def test_all_kinds_of_weights(spec: QuantSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv1d(5, 4, 1)).eval()
    quantized = fewbit.quantize(model, Recipe("test", (Rule("*", Scheme(spec)),)))
    loaded = fewbit.load(fewbit.save(quantized, tmp_path), model)
    assert_same(loaded, quantized, torch.randn(2, 5, 16))


def test_parametrized_layers(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(*(parametrizations.weight_norm(nn.Linear(16, 16)) for _ in range(2))).eval()

    torch.manual_seed(0)
    quantized = fewbit.quantize(normed(), ALL)
    loaded = fewbit.load(fewbit.save(quantized, tmp_path), normed())
    assert_same(loaded, quantized, torch.randn(3, 16))
    assert not torch.equal(loaded.get_buffer("0.weight_packed"), loaded.get_buffer("1.weight_packed"))


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    quantized = fewbit.quantize(nn.Linear(16, 8), ALL)
    assert_same(fewbit.load(fewbit.save(quantized, tmp_path), nn.Linear(16, 8)), quantized, torch.randn(2, 16))


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not quantized by fewbit"):
        fewbit.save(nn.Linear(2, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Interruptions


def failing_replace(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    replace, count = Path.replace, 0

    def interrupted(self: Path, target: Any) -> Path:
        nonlocal count
        count += 1
        if count == at:
            raise OSError("interrupted")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)


@pytest.mark.parametrize("report", [False, True], ids=["plain", "report"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_save_leaves_the_old_model_or_the_new_one(
    saved: tuple[Path, nn.Module, nn.Module], at: int, report: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, old = saved
    new = fewbit.quantize(model, Recipe("other", (Rule("0", Scheme(QuantSpec("int4", per_group(8)))),)))
    with monkeypatch.context() as patch:
        failing_replace(patch, at)
        if at == 3 and not report:
            fewbit.save(new, folder)  # two renamings are all
        else:
            with pytest.raises(CheckpointError, match="cannot be written: interrupted"):
                fewbit.save(new, folder, {"x": 1} if report else None)
    assert_same(fewbit.load(folder, model), old if at == 1 else new, torch.randn(3, 16))
    fewbit.save(old, folder)
    assert_same(fewbit.load(folder, model), old, torch.randn(3, 16))


def test_interrupted_first_save_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(16, 8)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        failing_replace(patch, 1)
        fewbit.save(fewbit.quantize(model, ALL), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="no such file"):
        fewbit.load(tmp_path, model)


def test_what_a_killed_save_left_does_not_matter(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, quantized = saved
    (folder / ".plan.json.next").write_text("half a pl")
    (folder / ".model.safetensors.next").write_bytes(b"half")
    assert_same(fewbit.load(folder, model), quantized, torch.randn(3, 16))
    fewbit.save(quantized, folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)


def test_a_save_killed_between_its_renamings_is_found(saved: tuple[Path, nn.Module, nn.Module]) -> None:
    folder, model, quantized = saved
    (folder / "plan.json").rename(folder / ".plan.json.next")
    (folder / "plan.json").write_text(json.dumps({"version": 1}))
    assert_same(fewbit.load(folder, model), quantized, torch.randn(3, 16))


def test_full_disk_leaves_the_old_model(
    saved: tuple[Path, nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, quantized = saved

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(Path, "write_text", full)
        fewbit.save(fewbit.quantize(model, "int8-static", [torch.randn(3, 16)]), folder)
    assert_same(fewbit.load(folder, model), quantized, torch.randn(3, 16))


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_folder_that_cannot_be_written(saved: tuple[Path, nn.Module, nn.Module], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
        fewbit.save(saved[2], tmp_path / below)
    assert (tmp_path / "file").read_text() == "in the way"


# Damage


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
def test_changed_plans_raise_nothing_but_checkpoint_errors(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "cnn":
        model = build("cnn")
        quantized = fewbit.quantize(model, "int8-static", [inputs("cnn")])
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
