"""Quantized folders through transformers: the same model as fewbit.load gives."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit import CheckpointError, UnsupportedError, streaming
from fewbit.huggingface import register_when_imported

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
RECIPE = "int4-weight-only"


@pytest.fixture
def out(decoder: Callable[..., Any], tmp_path: Path) -> Path:
    decoder(tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    return fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", RECIPE)


def from_pretrained(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "gpt2", "mixtral"])
def test_the_same_logits_and_texts(
    decoder: Callable[..., Any],
    decoder_batch: dict[str, Tensor],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(streaming, "FILE", 20_000)
    decoder(name).save_pretrained(tmp_path / "hf")
    out = fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", RECIPE)
    loaded: Any = fewbit.load(out)
    logging.getLogger("transformers").addHandler(caplog.handler)
    found = from_pretrained(out)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert fewbit.plan_of(found) == fewbit.plan_of(loaded)
    with torch.no_grad():
        assert torch.equal(found(**decoder_batch).logits, loaded(**decoder_batch).logits)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    texts = [model.generate(**decoder_batch, **settings) for model in (found, loaded)]
    assert torch.equal(*texts) and texts[0].shape[1] <= 9 + 6


def test_padding_changes_nothing(out: Path, decoder_batch: dict[str, Tensor]) -> None:
    model = from_pretrained(out, dtype=torch.float32)
    alone = decoder_batch["input_ids"][1:, 4:]
    both = model.generate(**decoder_batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(both[1:, 4:], model.generate(alone, max_new_tokens=6, do_sample=False))


def test_tied_tensors_are_one(out: Path) -> None:
    model = from_pretrained(out)
    assert model.get_buffer("lm_head.weight_packed") is model.get_buffer("model.embed_tokens.weight_packed")
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype(out: Path, decoder_batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    model = from_pretrained(out, dtype=dtype)
    with torch.no_grad():
        found, expected = model(**decoder_batch).logits, fewbit.load(out).to(dtype)(**decoder_batch).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=0 if dtype == torch.float32 else 2e-3, rtol=0)  # half frequencies
    assert model.get_buffer("model.layers.0.mlp.up_proj.weight_scale_scale").dtype == torch.float32


def test_what_save_writes_is_read_too(
    decoder: Callable[..., Any], decoder_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    quantized = fewbit.quantize(decoder(), RECIPE)
    found = from_pretrained(fewbit.save(quantized, tmp_path))
    again = from_pretrained(fewbit.save(found, tmp_path / "again"))
    with torch.no_grad():
        expected = quantized(**decoder_batch).logits
        assert torch.equal(found(**decoder_batch).logits, expected)
        assert torch.equal(again(**decoder_batch).logits, expected)


def test_damage_is_an_error(out: Path) -> None:
    file = out / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        from_pretrained(out)
    file.write_bytes(content)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"does not fit config.json"):
        from_pretrained(out)
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 193}))
    with pytest.raises(CheckpointError, match=r"does not fit config.json"):
        from_pretrained(out)


def test_a_float_folder_is_not_quantized_on_the_way(decoder: Callable[..., Any], tmp_path: Path) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    decoder().save_pretrained(tmp_path)
    config = AutoQuantizationConfig.from_dict({"quant_method": "fewbit"})
    with pytest.raises(UnsupportedError, match="from_pretrained does not quantize"):
        from_pretrained(tmp_path, quantization_config=config)


def test_save_pretrained_says_what_to_do(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewbit"):
        from_pretrained(out).save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    "first", ["import fewbit", "from transformers import AutoModelForCausalLM", "import transformers.quantizers.auto"]
)
def test_registered_once_both_are_imported(out: Path, first: str) -> None:
    script = (
        f"{first}\nimport fewbit\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "assert fewbit.plan_of(model).sites"
    )
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)


def test_importing_fewbit_does_not_import_transformers() -> None:
    script = "import sys, fewbit; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)


def test_a_transformers_that_lacks_the_tables_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    monkeypatch.delattr(auto, "AUTO_QUANTIZER_MAPPING")
    with pytest.warns(UserWarning, match="will not read folders of fewbit"):
        register_when_imported()
