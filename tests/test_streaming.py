"""Folder to folder: what quantizing in memory gives, in little memory, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit
from fewbit import (
    PER_TOKEN,
    CheckpointError,
    PlanError,
    QuantSpec,
    Recipe,
    Rule,
    Scheme,
    UnsupportedError,
    per_channel,
    per_group,
    streaming,
)
from fewbit.hardware import resident
from fewbit.targets import read_checkpoint, saved_bytes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
RECIPE = "int4-weight-only"
TWO_LEVELS = QuantSpec("int4", per_group(8), scale=QuantSpec("uint8", per_channel(0), symmetric=False))
RECIPES: dict[str, Any] = {
    "mse": RECIPE,
    "rtn": Recipe("rtn", (Rule("type:Linear|Embedding|Conv1D", Scheme(QuantSpec("int8", per_channel(0)))),)),
    "tensor": Recipe("tensor", (Rule("type:Linear", Scheme(QuantSpec("int8"), method="mse")),)),
    "two-levels": Recipe("two", (Rule("type:Linear", Scheme(TWO_LEVELS, method="mse")),)),
    "asymmetric": Recipe("zero", (Rule("type:Linear", Scheme(QuantSpec("int4", per_group(16), symmetric=False))),)),
    "dynamic": Recipe("d", (Rule("*", Scheme(QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN))),)),
}


@pytest.fixture
def source(decoder: Callable[..., Any], tmp_path: Path) -> Path:
    decoder(tie_word_embeddings=True).save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    return tmp_path / "hf"


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FILE", 8_000)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_same_model(one: Any, other: Any) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and fewbit.plan_of(one).sites == fewbit.plan_of(other).sites
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def looks_whole(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_same_model_as_quantized_in_memory(
    decoder: Callable[..., Any], decoder_batch: dict[str, Tensor], name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = decoder(name, dtype)
    model.save_pretrained(tmp_path / "hf")
    quantized = fewbit.quantize(model, RECIPE)
    assert fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", RECIPE) == tmp_path / "out"
    loaded = fewbit.load(tmp_path / "out")
    assert_same_model(loaded, quantized)
    with torch.no_grad():
        assert torch.equal(loaded(**decoder_batch).logits, quantized(**decoder_batch).logits)
    # What `save` writes holds the same tensors.
    files = [fewbit.save(quantized, tmp_path / "saved"), tmp_path / "out"]
    a, b = (load_file(folder / "model.safetensors") for folder in files)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert_same_model(fewbit.load(tmp_path / "saved"), quantized)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_pieces_make_no_difference(recipe: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewbit.quantize_folder(source, tmp_path / "whole", recipe)
    monkeypatch.setattr(streaming, "PIECE", 5 * 64)
    fewbit.quantize_folder(source, tmp_path / "pieces", recipe)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "pieces")
    from transformers import AutoModelForCausalLM

    quantized = fewbit.quantize(AutoModelForCausalLM.from_pretrained(source), recipe)
    assert_same_model(fewbit.load(tmp_path / "pieces"), quantized)


def test_several_files(source: Path, tmp_path: Path, many_files: None) -> None:
    out = fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    names = sorted(path.name for path in out.iterdir())
    files = [name for name in names if name.startswith("model-")]
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert {"config.json", "generation_config.json", "plan.json", "report.json"} < set(names)
    assert not any(name.startswith(".") for name in names)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {name: t.nbytes for file in files for name, t in load_file(out / file).items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) and index["weight_map"].keys() == sizes.keys()
    assert saved_bytes(out) == sum((out / file).stat().st_size for file in files)
    loaded = fewbit.load(out)
    assert loaded.get_buffer("lm_head.weight_packed") is loaded.get_buffer("model.embed_tokens.weight_packed")
    # Saving it makes one file again, and nothing of the others is left.
    fewbit.save(loaded, out)
    assert not list(out.glob("model-*")) and not (out / "model.safetensors.index.json").exists()
    assert_same_model(fewbit.load(out), loaded)


def test_report_has_the_error_of_each_weight(source: Path, tmp_path: Path) -> None:
    out = fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    errors = json.loads((out / "report.json").read_text())["weight_errors"]
    plan = read_checkpoint(out).plan
    assert errors.keys() == {f"{name}.weight" for name in plan.sites if name != "lm_head"}
    tables = {name for name in errors if plan.sites[name.removesuffix(".weight")].type == "Embedding"}
    assert all(0.01 < errors[name] < 0.03 if name in tables else 0.05 < errors[name] < 0.15 for name in errors)


def test_other_files_are_copied(source: Path, tmp_path: Path) -> None:
    texts = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{x}}",
        "vocab.txt": "a",
        "LICENSE": "MIT",
        "notes.md": "no",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "plan.json").write_text("not ours")
    out = fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    copied = {path.name: path.read_text() for path in out.iterdir() if path.name in texts}
    assert copied == {name: text for name, text in texts.items() if name != "notes.md"}
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "fewbit", "recipe": RECIPE}
    assert config == json.loads((source / "config.json").read_text())


# Interruptions

KILLED = """
import os, signal, sys
import fewbit
from fewbit import streaming
streaming.FILE = 8_000
count, quantize = 0, streaming.Job._quantize
def dying(*arguments):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return quantize(*arguments)
streaming.Job._quantize = dying
fewbit.quantize_folder(sys.argv[1], sys.argv[2], "int4-weight-only")
"""


def test_killed_and_run_again(source: Path, tmp_path: Path, many_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fewbit.quantize_folder(source, tmp_path / "whole", RECIPE)
    out = tmp_path / "out"
    for after in (12, 2):
        result = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), str(after)], timeout=120)
        assert result.returncode < 0 and not looks_whole(out)
        with pytest.raises(CheckpointError, match="Its quantization was interrupted: run it again"):
            fewbit.load(out)
    done = {path.name: path.stat().st_ino for path in out.glob("model-*")}
    assert len(done) > 2
    fewbit.quantize_folder(source, out, RECIPE)
    assert hashes(out) == hashes(whole)
    assert all((out / name).stat().st_ino == number for name, number in done.items())


@pytest.mark.parametrize("call", range(0, 60, 7))
def test_full_disk_at_any_moment(
    call: int, source: Path, tmp_path: Path, many_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, count = tmp_path / "out", 0
    write = os.pwrite

    def full(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
        patch.setattr(os, "pwrite", full)
        fewbit.quantize_folder(source, out, RECIPE)
    assert not looks_whole(out) and not list(out.glob("*.next"))
    fewbit.quantize_folder(source, out, RECIPE)
    assert hashes(out) == hashes(fewbit.quantize_folder(source, tmp_path / "whole", RECIPE))


@pytest.mark.parametrize("name", ["config.json", "plan.json", "report.json", "model.safetensors.index.json"])
def test_full_disk_at_the_end(
    name: str, source: Path, tmp_path: Path, many_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replaced = tmp_path / "out", Path.replace

    def full(self: Path, target: Any) -> Path:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replaced(self, target)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
        patch.setattr(Path, "replace", full)
        fewbit.quantize_folder(source, out, RECIPE)
    assert not looks_whole(out)
    fewbit.quantize_folder(source, out, RECIPE)
    assert hashes(out) == hashes(fewbit.quantize_folder(source, tmp_path / "whole", RECIPE))


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, many_files: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streaming.Job, "_finish", stopped)
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    return tmp_path / "out"


def test_unfinished_work_of_another_recipe_or_source_stays(unfinished: Path, source: Path, tmp_path: Path) -> None:
    before = hashes(unfinished)
    with pytest.raises(CheckpointError, match="unfinished quantization of another source or recipe"):
        fewbit.quantize_folder(source, unfinished, "int4-compact")
    shard = sorted(source.glob("model-*"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(CheckpointError, match="unfinished quantization of another source or recipe"):
        fewbit.quantize_folder(source, unfinished, RECIPE)
    assert hashes(unfinished) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"job": 1, "files": {}}', '{"job": "x", "files": {"gone": {}}}'])
def test_a_damaged_record_is_an_error(unfinished: Path, source: Path, content: str) -> None:
    (unfinished / ".progress.json").write_text(content)
    with pytest.raises(CheckpointError, match=r".progress.json: damaged"):
        fewbit.quantize_folder(source, unfinished, RECIPE)


def test_files_of_two_runs_are_not_mixed(source: Path, tmp_path: Path, many_files: None) -> None:
    one = fewbit.quantize_folder(source, tmp_path / "one", RECIPE)
    two = fewbit.quantize_folder(source, tmp_path / "two", RECIPE, exclude=["lm_head"])
    files = sorted(path.name for path in one.glob("model-*"))
    other = sorted(path.name for path in two.glob("model-*"))[-1]
    (one / files[-1]).write_bytes((two / other).read_bytes())
    with pytest.raises(CheckpointError, match="is of another checkpoint than the files before it"):
        fewbit.load(one)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_with_a_model_is_left_alone(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(CheckpointError, match=f"has a {name} already; give a new folder"):
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    assert hashes(tmp_path / "out").keys() == {name}
    before = hashes(source)
    with pytest.raises(CheckpointError, match="is the source; give another folder"):
        fewbit.quantize_folder(source, source / ".", RECIPE)
    assert hashes(source) == before


def test_an_out_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    assert (tmp_path / "out").read_text() == "precious"


# What is refused


def test_recipes_that_need_data(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="fixes input ranges, which quantize_folder does not"):
        fewbit.quantize_folder(source, tmp_path / "out", "int8-static")
    recipe = replace(RECIPES["rtn"], transforms=("fuse_activation",))
    plan = read_checkpoint(fewbit.quantize_folder(source, tmp_path / "out", recipe)).plan
    assert plan.skipped["transform fuse_activation"] == "it needs a calibration batch"


def test_weights_that_are_not_finite_are_named(source: Path, tmp_path: Path) -> None:
    shard = next(path for path in source.glob("model-*") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][1, 1] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(PlanError, match=f"{name}: cannot be quantized: found 1 NaN"):
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE)
    assert not looks_whole(tmp_path / "out")


def test_too_little_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = resident()
    with pytest.raises(UnsupportedError, match=r"max_ram is 1 MB, of which the process takes .* rows need .* MB"):
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE, max_ram="1MB")
    assert not (tmp_path / "out").exists()
    with pytest.raises(fewbit.FewbitError, match="'lots'"):
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE, max_ram="lots")
    with monkeypatch.context() as patch, pytest.raises(UnsupportedError, match="What is done is kept"):
        counts = iter([*[taken] * 40])
        patch.setattr(streaming, "resident", lambda: next(counts, 10**12))
        fewbit.quantize_folder(source, tmp_path / "out", RECIPE, max_ram=10**11)
    fewbit.quantize_folder(source, tmp_path / "out", RECIPE, max_ram=taken + 10**9)


MEASURED = """
import resource, sys
import fewbit
from fewbit.source import open_source
open_source(sys.argv[1])  # transformers is loaded
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
limit = base + 150 * 2**20
fewbit.quantize_folder(sys.argv[1], sys.argv[2], "int4-compact", max_ram=limit)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert peak <= limit, (peak, limit)
"""


def test_memory_stays_below_the_limit(decoder: Callable[..., Any], tmp_path: Path) -> None:
    # The embedding alone is larger than what is allowed.
    model = decoder(vocab_size=40_000, hidden_size=2048, num_hidden_layers=1, tie_word_embeddings=True)
    assert model.model.embed_tokens.weight.nbytes > 150 * 2**20
    model.save_pretrained(tmp_path / "hf")
    del model
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:fewbit",
        "-c",
        MEASURED,
        str(tmp_path / "hf"),
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, timeout=300)
    assert saved_bytes(tmp_path / "out") < 0.5 * saved_bytes(tmp_path / "hf")
