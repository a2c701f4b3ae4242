"""Folder to folder with data: what quantizing in memory gives, with one block's weights in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit import CheckpointError, Recipe, Rule, Scheme, UnsupportedError, placing, streaming
from fewbit.placing import Placed
from fewbit.source import open_source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
INT4 = fewbit.load_recipe("int4-gptq").rules[0].scheme
assert INT4 is not None
MSE = Scheme(INT4.weight, method="mse")
RECIPES: dict[str, Any] = {
    "gptq": "int4-gptq",
    "importance": "int4-weight-only",
    "both": Recipe(
        "both",
        (
            Rule("*.down_proj", MSE, optional=True),
            Rule("type:Linear|Conv1D", INT4, optional=True),
            Rule("type:Embedding", MSE),
        ),
    ),
    "blocks": Recipe("blocks", (Rule("*.layers.*.?_proj", INT4),)),
}


def texts(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 192, (2, 24), generator=random)} for _ in range(count)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_same(one: Any, other: Any) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture
def source(decoder: Callable[..., Any], tmp_path: Path) -> Path:
    decoder(tie_word_embeddings=True).save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    return tmp_path / "hf"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gpt2", {}),
        ("mixtral", {}),
    ],
    ids=["llama", "tied", "qwen3", "gemma", "gpt2", "mixtral"],
)
def test_the_same_model_as_quantized_in_memory(
    decoder: Callable[..., Any], recipe: Any, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    if name == "gpt2" and recipe == RECIPES["blocks"]:
        pytest.skip("no layer of GPT-2 has such a name")
    model = decoder(name, torch.float32, **settings)
    model.save_pretrained(tmp_path / "hf")
    expected = fewbit.quantize(model, recipe, texts())
    fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", recipe, calibration=texts())
    assert_same(fewbit.load(tmp_path / "out"), expected)
    plain = fewbit.quantize(model, recipe)
    assert any(not torch.equal(x, plain.state_dict()[name]) for name, x in expected.state_dict().items())


def test_pieces_make_no_difference(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewbit.quantize_folder(source, tmp_path / "whole", "int4-gptq", calibration=texts())
    monkeypatch.setattr(streaming, "PIECE", 5 * 64)
    fewbit.quantize_folder(source, tmp_path / "pieces", "int4-gptq", calibration=texts())
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "pieces")


@pytest.mark.parametrize("recipe", [RECIPES["gptq"], RECIPES["both"]], ids=["gptq", "both"])
@pytest.mark.parametrize("stop", [1, 3, 8, 17])
def test_an_interrupted_run_goes_on(
    source: Path, tmp_path: Path, recipe: Any, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "FILE", 8_000)
    fewbit.quantize_folder(source, tmp_path / "whole", recipe, calibration=texts())
    quantize, count = streaming.Job._quantize, 0

    def stopping(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count > stop:
            raise KeyboardInterrupt
        return quantize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streaming.Job, "_quantize", stopping)
        with pytest.raises(KeyboardInterrupt):
            fewbit.quantize_folder(source, tmp_path / "out", recipe, calibration=texts())
    with pytest.raises(CheckpointError, match="an unfinished quantization of another source or recipe"):
        fewbit.quantize_folder(source, tmp_path / "out", recipe, calibration=texts(seed=1))
    walked: list[str] = []
    block = placing.Placed.block
    monkeypatch.setattr(placing.Placed, "block", lambda self, name: walked.append(name) or block(self, name))
    fewbit.quantize_folder(source, tmp_path / "out", recipe, calibration=texts())
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert walked == [f"model.layers.{number}" for number in range(3)]


def test_blocks_have_their_weights_only_while_they_run(source: Path) -> None:
    placed = Placed(open_source(source), [f"model.layers.{number}" for number in range(3)])
    model: Any = placed.model
    seen: list[list[bool]] = []

    def see(*_: Any) -> None:
        seen.append([layer.mlp.up_proj.weight.is_meta for layer in model.model.layers])

    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(see)
    with torch.no_grad():
        logits = model(**texts()[0]).logits
    assert seen == [[False, True, True], [True, False, True], [True, True, False]]
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(source)(**texts()[0]).logits)
    with placed.block("model.layers.1"):
        assert not model.model.layers[1].mlp.up_proj.weight.is_meta
    with pytest.raises(ZeroDivisionError):
        model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        model(**texts()[0])
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())


def test_static_ranges_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="fixes input ranges, which quantize_folder does not"):
        fewbit.quantize_folder(source, tmp_path / "out", "int8-static", calibration=texts())
