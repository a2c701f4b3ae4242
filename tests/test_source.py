"""Hugging Face folders as float weights: the numbers that transformers loads, and clear words about what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit import CheckpointError, FewbitError, UnsupportedError
from fewbit.source import open_source, warn_unused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(decoder: Callable[..., Any], tmp_path: Path) -> Path:
    decoder().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "gpt2", "mixtral"])
def test_every_tensor_is_the_one_that_transformers_loads(
    decoder: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    decoder(name).save_pretrained(tmp_path, max_shard_size="100KB")
    source = open_source(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert source.unused == () and not source.model.training
    assert all(parameter.is_meta for parameter in source.model.parameters())
    for key, parameter in expected.named_parameters():
        weight = source.weights[key]
        assert weight.dtype == parameter.dtype and torch.equal(weight.make(), parameter)
    for key, buffer in expected.named_buffers():
        assert torch.equal(source.model.get_buffer(key), buffer)


def test_a_checkpoint_of_the_inner_model_alone(decoder: Callable[..., Any], tmp_path: Path) -> None:
    model = decoder("gpt2")
    model.transformer.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["GPT2LMHeadModel"])
    source = open_source(tmp_path)
    assert all(torch.equal(source.weights[name].make(), p) for name, p in model.named_parameters())


def test_a_tied_head_may_be_in_the_files_if_it_is_the_same(decoder: Callable[..., Any], tmp_path: Path) -> None:
    decoder(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    assert "lm_head.weight" not in open_source(tmp_path).weights
    tensors["lm_head.weight"][100, 3] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight and lm_head.weight: tied by config.json"):
        open_source(tmp_path)


def test_tensors_of_no_layer_are_named(folder: Path) -> None:
    save_file(
        {"model.extra": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, folder / "x"
    )
    (folder / "x").rename(folder / "model-extra.safetensors")
    index = json.loads((folder / INDEX).read_text())
    names = ("model.extra", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(folder / INDEX, weight_map={**index["weight_map"], **dict.fromkeys(names, "model-extra.safetensors")})
    source = open_source(folder)
    assert source.unused == ("model.extra",)
    with pytest.warns(UserWarning, match="1 tensors are in no layer of LlamaForCausalLM and are left out: model.extra"):
        warn_unused(source)


def test_fingerprint_follows_content(folder: Path) -> None:
    import os

    before = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == before
    shard = sorted(folder.glob("model-*"))[0]
    os.utime(shard, ns=(1, 1))
    assert open_source(folder).fingerprint() != before


# Bad input


def test_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file, but {INDEX} names it"):
        open_source(folder)


def test_truncated_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard.name}: has .* bytes, its header says .*: cut off"):
        open_source(folder)


def test_index_that_names_an_absent_tensor(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={**places, "model.layers.9.weight": next(iter(places.values()))})
    with pytest.raises(CheckpointError, match=r"index.json: model.layers.9.weight: is not in model-0000"):
        open_source(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="not an index of safetensors files"):
        open_source(folder)


def test_missing_tensor_and_the_same_tensor_twice(folder: Path) -> None:
    shards = sorted(folder.glob("model-*"))
    tensors = load_file(shards[0])
    name, tensor = tensors.popitem()
    save_file(tensors, shards[0], {"format": "pt"})
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    del places[name]
    edit(folder / INDEX, weight_map=places)
    with pytest.raises(CheckpointError, match=rf"no tensor for {name} \(1 missing\)"):
        open_source(folder)
    for shard in shards[:2]:
        save_file({**load_file(shard), name: tensor}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: is in model-00001-of-.* too"):
        open_source(folder)


def test_wrong_shape_and_wrong_dtype(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[0]
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file({**tensors, name: tensors[name][:-1].clone()}, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: {name}: found \[.*\], config.json makes it \["):
        open_source(folder)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, shard)
    with pytest.raises(CheckpointError, match=f"{name}: found torch.int8, needs float weights: torch.float32"):
        open_source(folder)


def test_no_weights_at_all(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file, and no model.safetensors.index.json"):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Nonesuch"]}, "architecture 'Nonesuch' is not in transformers"),
        ({"architectures": None}, "architecture '' is not in transformers"),
        ({"hidden_size": "many"}, "transformers cannot build a LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
    ],
    ids=["unknown", "none", "invalid", "quantized"],
)
def test_configurations_that_cannot_be_used(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=message):
        open_source(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_configuration(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(FewbitError, match=r"has no config.json|not a Hugging Face configuration"):
        open_source(folder)


def test_experts_that_do_not_fit_together(decoder: Callable[..., Any], tmp_path: Path) -> None:
    decoder("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".experts.0." in name)
    save_file({**tensors, name: tensors[name][:-1].clone()}, path)
    with pytest.raises(CheckpointError, match="its parts do not fit together"):
        open_source(tmp_path)
