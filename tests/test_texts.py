"""Windows of tokens, and language models that are judged by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import CalibrationError, FewbitError
from fewbit.texts import own_windows, random_windows, read_windows, text_task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEXT = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def folder(decoder: Callable[..., Any], write_tokenizer: Callable[[Path], None], tmp_path: Path) -> Path:
    decoder(vocab_size=512, dtype=torch.float32).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    return tmp_path / "hf"


def test_windows_are_spread_over_the_text(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    found = [window["input_ids"] for window in read_windows(folder, TEXT, 3, 17)]
    assert [window.shape for window in found] == [(1, 17)] * 3
    begin = AutoTokenizer.from_pretrained(folder).bos_token_id
    assert found[0][0].tolist() == [begin, *tokens[:16]]
    last = len(tokens) // 16 - 1
    assert found[2][0].tolist() == [begin, *tokens[16 * last : 16 * last + 16]]


def test_a_short_text_has_fewer_windows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two three four five six seven eight")
    assert 1 <= len(read_windows(folder, tmp_path / "short.txt", 16, 9)) < 16
    with pytest.raises(CalibrationError, match=r"short.txt: has \d+ tokens; one window of 1024 needs 1023"):
        read_windows(folder, tmp_path / "short.txt")
    with pytest.raises(CalibrationError, match=r"none.txt: cannot be read as UTF-8 text"):
        read_windows(folder, tmp_path / "none.txt")
    with pytest.raises(FewbitError, match="has no tokenizer that transformers can read"):
        read_windows(tmp_path, TEXT)


def test_random_tokens_are_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    found = [window["input_ids"] for window in random_windows(folder, 3, 17)]
    assert [window.shape for window in found] == [(1, 17)] * 3
    tokens = torch.cat(found)
    assert tokens.min() >= 0 and 256 < tokens.max() < 512
    assert set(tokens[:, 0].tolist()) == {json.loads((folder / "config.json").read_text())["bos_token_id"]}
    assert torch.equal(tokens, torch.cat([window["input_ids"] for window in random_windows(folder, 3, 17)]))
    assert not torch.equal(tokens, torch.cat([window["input_ids"] for window in random_windows(folder, 3, 17, seed=1)]))
    with pytest.raises(FewbitError, match="has no configuration that transformers can read"):
        random_windows(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "vocab_size": 100}')  # has no begin token
    assert random_windows(tmp_path)[0]["input_ids"].max() < 100
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(FewbitError, match="a ResNetConfig has no vocab_size"):
        random_windows(tmp_path)


def test_a_model_writes_what_it_predicts(folder: Path) -> None:
    model: Any = fewbit.load_task(folder).model
    # Each token is followed by the next one, whatever came before.
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        table = torch.randn(512, model.config.hidden_size)
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight = torch.nn.Parameter(100 * table.roll(1, 0))
    found = own_windows(model, 18, 5)
    assert [window["input_ids"].shape for window in found] == [(16, 5), (2, 5)]
    begin = model.config.bos_token_id
    assert torch.cat([window["input_ids"] for window in found]).tolist() == [list(range(begin, begin + 5))] * 18


def test_a_cache_changes_no_text(folder: Path) -> None:
    model: Any = fewbit.load_task(folder).model
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # what comes next depends on what came before
    [cached] = own_windows(model, 8, 20)
    forward, given = model.forward, []

    def without_cache(input_ids: torch.Tensor, **_: Any) -> Any:
        given.append(input_ids.shape[1])
        return forward(input_ids=input_ids, use_cache=False)

    model.forward = without_cache
    [whole] = own_windows(model, 8, 20)
    assert given == list(range(1, 20))
    assert torch.equal(cached["input_ids"], whole["input_ids"])


def test_dropout_is_off_while_a_model_writes(folder: Path) -> None:
    model: Any = fewbit.load_task(folder).model
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: torch.nn.functional.dropout(output, 0.5, module.training)
    )
    [expected], state = own_windows(model, 8, 6), torch.get_rng_state()
    [found] = own_windows(model.train(), 8, 6)
    assert torch.equal(found["input_ids"], expected["input_ids"]) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_model_writes_is_the_same_each_time(folder: Path) -> None:
    model: Any = fewbit.load_task(folder).model
    first, second, other = (own_windows(model, 3, 6, seed)[0]["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not first.is_inference() and {*first[:, 0].tolist()} == {model.config.bos_token_id}
    model.config.bos_token_id = None
    assert len({*own_windows(model, 8, 2)[0]["input_ids"][:, 0].tolist()}) > 1
    with pytest.raises(FewbitError, match="own_windows: this Linear: a NoneType has no vocab_size"):
        own_windows(torch.nn.Linear(2, 2))
    model.config.bos_token_id = 10**6
    with pytest.raises(FewbitError, match=r"own_windows: this LlamaForCausalLM raised IndexError on \[3, 1\] tokens"):
        own_windows(model, 3)
    model.config.bos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(
        FewbitError, match="returned logits with NaN or infinity: load it in float32, or calibrate with"
    ):
        own_windows(model)
    encoder = model.model
    with pytest.raises(FewbitError, match="own_windows: this LlamaModel returned no logits"):
        own_windows(encoder)


def test_a_model_is_judged_by_its_likelihood(folder: Path) -> None:
    task = text_task(folder, TEXT, 4, 32)
    assert task.evaluate is not None
    scores = task.evaluate(task.model)
    assert scores.shape == (4,)
    tokens = task.calibration[1]["input_ids"]
    with torch.no_grad():
        loss = task.model(tokens, labels=tokens).loss
    torch.testing.assert_close(-scores[1], loss, atol=1e-5, rtol=1e-5)
    quantized = fewbit.quantize(task.model, "int4-weight-only")
    comparison = fewbit.compare(task.model, quantized, task.calibration, task.evaluate)
    assert "KL" in str(comparison)
