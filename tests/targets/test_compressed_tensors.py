"""compressed-tensors: transformers loads what fewbit exports, and computes the same."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewbit
from fewbit import PER_TOKEN, CheckpointError, QuantSpec, Recipe, Rule, Scheme, UnsupportedError, per_channel, per_group
from fewbit.targets.compressed_tensors import export_compressed_tensors

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")
W4A16 = "int4-symmetric"
W8A8 = Recipe("w8a8", (Rule("type:Linear", Scheme(QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN))),))


def exported(model: Any, recipe: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "hf")
    fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", recipe)
    return fewbit.export_folder(tmp_path / "out", tmp_path / "exported", "compressed-tensors")


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits.float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_int4_in_groups(
    decoder: Callable[..., Any], decoder_batch: dict[str, Tensor], name: str, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = exported(decoder(name, torch.float32, tie_word_embeddings=tied), W4A16, tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(out), decoder_batch)
    expected = logits(fewbit.load(tmp_path / "out"), decoder_batch)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and config["ignore"] == (["lm_head"] if tied else [])
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert ("lm_head.weight_packed" in tensors) != tied and "lm_head.weight" not in tensors
    name = next(name for name in tensors if name.endswith("down_proj.weight_shape"))
    assert tensors[name].tolist() == [64, 128]
    assert {path.name for path in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_int8_with_dynamic_activations(
    decoder: Callable[..., Any], decoder_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out = exported(decoder("llama", torch.float32), W8A8, tmp_path)
    float_inputs = Recipe("w8", (Rule("type:Linear", Scheme(QuantSpec("int8", per_channel(0)))),))
    expected = logits(fewbit.quantize(decoder("llama", torch.float32), float_inputs), decoder_batch)
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    found = logits(model, decoder_batch)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized" and config["config_groups"]["group_0"]["input_activations"]["dynamic"]


@pytest.mark.parametrize(
    "weight",
    [
        QuantSpec("int4", per_group(32), symmetric=False),
        QuantSpec("nf4", per_group(32)),
        QuantSpec("int8"),
        QuantSpec("int4", per_group(32), scale=QuantSpec("int8", per_channel(0))),
    ],
    ids=["asymmetric", "nf4", "per-tensor", "two-level"],
)
def test_other_schemes_are_refused(decoder: Callable[..., Any], weight: QuantSpec, tmp_path: Path) -> None:
    recipe = Recipe("other", (Rule("type:Linear", Scheme(weight)),))
    with pytest.raises(UnsupportedError, match="compressed-tensors gets symmetric int4 in groups"):
        exported(decoder(), recipe, tmp_path)
    assert not (tmp_path / "exported").exists()


def test_two_schemes_and_none_are_refused(decoder: Callable[..., Any], tmp_path: Path) -> None:
    recipe = fewbit.load_recipe(W4A16).override("lm_head", Scheme(QuantSpec("int8", per_channel(0))))
    with pytest.raises(UnsupportedError, match=r"needs linear layers of one scheme, found .*int4, lm_head: int8"):
        exported(decoder(), recipe, tmp_path)
    table = Recipe("table", (Rule("type:Embedding", Scheme(QuantSpec("int8", per_channel(0)))),))
    fewbit.quantize_folder(tmp_path / "hf", tmp_path / "two", table)
    with pytest.raises(UnsupportedError, match="found none"):
        export_compressed_tensors(tmp_path / "two", tmp_path / "exported")


def test_nothing_is_overwritten_or_half_written(
    decoder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="exported: cannot be written"):
        decoder().save_pretrained(tmp_path / "hf")
        fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", W4A16)
        patch.setattr(os, "pwrite", full)
        export_compressed_tensors(tmp_path / "out", tmp_path / "exported")
    assert not list((tmp_path / "exported").glob("*safetensors*"))
    export_compressed_tensors(tmp_path / "out", tmp_path / "exported")
    with pytest.raises(CheckpointError, match=r"has a model.safetensors already"):
        export_compressed_tensors(tmp_path / "out", tmp_path / "exported")


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"unknown format 'ggml'\. Allowed: compressed-tensors, gguf"):
        fewbit.export_folder(tmp_path, tmp_path / "x", "ggml")
