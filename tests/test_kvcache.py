"""int8_cache: as generate without it, nearly; a quarter of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import UnsupportedError
from fewbit.kvcache import _packed, _values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_and_head_has_its_own_scale(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 5, 16) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[0, 1, 2] = 0
    packed = _packed(x)
    found = _values(packed, dtype)
    assert packed.dtype == torch.int8 and packed.shape == (2, 3, 5, 20) and found.dtype == dtype
    step = x.float().abs().amax(-1, keepdim=True) / 127
    assert bool(((found - x).abs() <= 0.51 * step + x.abs() * torch.finfo(dtype).eps).all())
    assert torch.equal(_packed(x[:, :, 3:]), packed[:, :, 3:])


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "gpt2", "mixtral"])
def test_logits_are_nearly_those_without_it(
    decoder: Callable[..., Any], decoder_batch: dict[str, Tensor], name: str
) -> None:
    model = decoder(name, torch.float32)
    cache = fewbit.int8_cache(model)
    with torch.no_grad():
        exact = model(**decoder_batch).logits
        first = {key: value[:, :6] for key, value in decoder_batch.items()}
        found = [model(**first, past_key_values=cache).logits]
        for place in (6, 7, 8):
            tokens = decoder_batch["input_ids"][:, place : place + 1]
            mask = decoder_batch["attention_mask"][:, : place + 1]
            found.append(model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits)
    seen = decoder_batch["attention_mask"].bool()
    error = (torch.cat(found, 1) - exact)[seen].norm() / exact[seen].norm()
    assert 0 < error < 0.01
    assert cache.get_seq_length() == 9
    [keys] = {tuple(layer.keys.shape) for layer in cache.layers}
    assert keys[0] == 2 and keys[2] == 9 and cache.layers[0].keys.dtype == torch.int8


def test_beams_and_cropping_take_scales_along(decoder: Callable[..., Any], decoder_batch: dict[str, Tensor]) -> None:
    model = decoder("llama", torch.float32)
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with torch.no_grad():
        expected = model.generate(**decoder_batch, **settings)
        found = model.generate(**decoder_batch, past_key_values=fewbit.int8_cache(model), **settings)
    assert torch.equal(found, expected)
    cache = fewbit.int8_cache(model)
    with torch.no_grad():
        whole = model(decoder_batch["input_ids"][:, :6], past_key_values=cache)
        cache.crop(-2)
        again = model(decoder_batch["input_ids"][:, 4:6], past_key_values=cache).logits
    torch.testing.assert_close(again, whole.logits[:, 4:], atol=1e-5, rtol=1e-4)


def test_sliding_windows_stay_as_they_are(decoder: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="no layer of this MistralForCausalLM keeps all keys and values"):
        fewbit.int8_cache(decoder("mistral", sliding_window=4))


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a language model of transformers, found a Linear"):
        fewbit.int8_cache(nn.Linear(2, 2))
