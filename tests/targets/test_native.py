"""fewbit's checkpoint: bit-equal after loading, whole after interruptions, and clear about damage."""

from __future__ import annotations

import json
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
