"""complete: a first try of a quantized folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import fewbit
from fewbit import FewbitError, UnsupportedError
from fewbit.generation import complete

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def out(decoder: Callable[..., Any], tmp_path: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    decoder().save_pretrained(tmp_path / "hf")
    words = {f"w{number}": number for number in range(192)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(tmp_path / "hf")
    return fewbit.quantize_folder(tmp_path / "hf", tmp_path / "out", "int4-weight-only")


def test_a_text_goes_on(out: Path) -> None:
    text = complete(out, "w7 w8 w9", 5)
    assert text.startswith("w7 w8 w9 w") and len(text.split()) <= 8
    assert complete(out, "w7 w8 w9", 5) == text


def test_no_tokenizer(out: Path) -> None:
    for file in out.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FewbitError, match="has no tokenizer that transformers can read"):
        complete(out, "w7")


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    fewbit.save(fewbit.quantize(BertModel(config).eval(), "int4-weight-only"), tmp_path)
    with pytest.raises(UnsupportedError, match="BertModel does not generate text"):
        complete(tmp_path, "x")
