"""Hugging Face models, tiny and random: quantized, generating, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fewbit
from fewbit.pipeline import sites_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
VOCABULARY = 192
RECIPES = ["int8-dynamic", "int4-weight-only"]


def llama(tied: bool) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=256,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(bert_config()),
    "llama-tied": lambda: llama(True),
    "llama-untied": lambda: llama(False),
    "gpt2": gpt2,
}
GENERATING = ["llama-tied", "llama-untied", "gpt2"]


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(**batch())
    result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result[batch()["attention_mask"].bool()]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_near_float_and_the_model_unchanged(name: str, recipe: str) -> None:
    model = made(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    quantized = fewbit.quantize(model, recipe)
    exact, found = answer(model), answer(quantized)
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < (0.03 if recipe == "int8-dynamic" else 0.25)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert len(list(sites_of(quantized))) >= 8


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_model_is_bit_equal(name: str, recipe: str, tmp_path: Path) -> None:
    quantized = fewbit.quantize(made(name), recipe, [batch()])
    fewbit.save(quantized, tmp_path)
    with torch.device("meta"):
        meta = MODELS[name]()
    torch.manual_seed(99)
    for model in (MODELS[name](), meta):
        loaded = fewbit.load(tmp_path, model)
        assert torch.equal(answer(loaded), answer(quantized))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", GENERATING)
def test_generation_runs_and_is_deterministic(name: str, recipe: str, tmp_path: Path) -> None:
    model = made(name)
    quantized: Any = fewbit.quantize(model, recipe)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    prompt = {key: value[:1] for key, value in batch().items()}
    first = quantized.generate(**prompt, **settings)
    assert first.shape == (1, 9 + 8) and torch.equal(first[:, :9], prompt["input_ids"])
    assert torch.equal(quantized.generate(**prompt, **settings), first)
    loaded: Any = fewbit.load(fewbit.save(quantized, tmp_path), made(name))
    assert torch.equal(loaded.generate(**prompt, **settings), first)


def test_generation_with_and_without_cache_agree() -> None:
    quantized: Any = fewbit.quantize(made("llama-untied"), "int8-dynamic")
    prompt = {key: value[:1] for key, value in batch().items()}
    results = [quantized.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(("name", "embedding"), [("llama-tied", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_tied_head_and_embedding_are_one_tensor(name: str, embedding: str) -> None:
    quantized = fewbit.quantize(made(name), "int8-dynamic")
    plan = fewbit.plan_of(quantized)
    assert plan.ties == ((f"{embedding}.weight", "lm_head.weight"),)
    assert quantized.get_buffer(f"{embedding}.weight_packed") is quantized.get_buffer("lm_head.weight_packed")


@pytest.mark.parametrize(("name", "embedding"), [("llama-tied", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_tied_head_and_embedding_stay_float_where_one_has_no_rule(name: str, embedding: str) -> None:
    recipe = fewbit.load_recipe("int4-weight-only")
    linear = fewbit.Recipe("linear", tuple(rule for rule in recipe.rules if "Linear" in rule.pattern))
    quantized = fewbit.quantize(made(name), linear)
    plan = fewbit.plan_of(quantized)
    assert plan.ties == () and "lm_head" in plan.skipped and embedding in plan.skipped
    assert "tied to" in plan.skipped["lm_head"]
    assert quantized.get_parameter(f"{embedding}.weight") is quantized.get_parameter("lm_head.weight")


def test_transposed_conv1d_is_quantized() -> None:
    plan = fewbit.plan_of(fewbit.quantize(made("gpt2"), "int8-dynamic"))
    site = plan.sites["transformer.h.0.attn.c_attn"]
    assert site.type == "Conv1D" and site.weights == {"weight": (3 * 256, 256)}


def test_static_ranges_from_batches_with_labels() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config()).eval()
    data = [{**batch(), "labels": torch.tensor([0, 1])}]
    quantized = fewbit.quantize(model, "int8-static", data)
    plan = fewbit.plan_of(quantized)
    assert plan.sites["bert.encoder.layer.0.attention.self.query"].scheme.input is not None
    with torch.no_grad():
        exact, found = model(**batch()).logits, quantized(**batch()).logits
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.1)


def test_layer_drops_and_output_errors_of_a_language_model() -> None:
    model = made("llama-untied")
    quantized = fewbit.quantize(model, "int8-dynamic")
    comparison = fewbit.compare(model, quantized, [batch()])
    assert comparison.outputs.kl is not None and 0 < comparison.outputs.kl < 0.01
    assert {layer.name for layer in comparison.layers} == set(fewbit.plan_of(quantized).sites)
