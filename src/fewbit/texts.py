"""Texts for language models: windows of tokens to calibrate with, and to be judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import evaluating
from fewbit.errors import CalibrationError, FewbitError, UnsupportedError
from fewbit.task import Task, load_task

WINDOWS = 16
LENGTH = 1024
RANDOM_WINDOWS, RANDOM_LENGTH = 8, 256
OWN_WINDOWS, OWN_LENGTH, OWN_BATCH = 128, 16, 16  # many beginnings: a text stays with what it began with


def read_windows(
    folder: str | Path, file: str | Path, count: int = WINDOWS, length: int = LENGTH
) -> list[dict[str, Tensor]]:
    """``count`` batches of one window of ``length`` tokens each, at even distances over a text file, or as many as it has.

    Tokens are those of the tokenizer in ``folder``; a window begins with its begin token, if it has one. CalibrationError
    for a file that cannot be read or is too short, FewbitError for a folder without a tokenizer.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file}: cannot be read as UTF-8 text: {error}.") from None
    tokenizer = read_tokenizer(folder)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    own = length - len(begin)
    whole = len(tokens) // own
    if not whole:
        raise CalibrationError(f"{file}: has {len(tokens)} tokens; one window of {length} needs {own}.")
    chosen = torch.linspace(0, whole - 1, min(count, whole)).long().unique().tolist()
    first = torch.tensor(begin, dtype=torch.int64)
    return [{"input_ids": torch.cat([first, tokens[n * own : (n + 1) * own]])[None]} for n in chosen]


def random_windows(
    folder: str | Path, count: int = RANDOM_WINDOWS, length: int = RANDOM_LENGTH, seed: int = 0
) -> list[dict[str, Tensor]]:
    """``count`` batches of one window of ``length`` tokens each, drawn at random, behind the begin token if there is one.

    A stand-in for a text: which inputs of a layer are large depends more on the model than on what it reads. FewbitError for a
    folder without the configuration of a language model, UnsupportedError without transformers.
    """
    config = _read(folder, "AutoConfig", "configuration")
    tokens = _random_tokens(config, (count, length), torch.Generator().manual_seed(seed), str(folder))
    return [{"input_ids": window} for window in tokens.split(1)]


def own_windows(
    model: nn.Module, count: int = OWN_WINDOWS, length: int = OWN_LENGTH, seed: int = 0
) -> list[dict[str, Tensor]]:
    """``count`` windows of ``length`` tokens each that a language model writes itself, in batches of OWN_BATCH.

    Each token is drawn from what the model predicts, the first is its begin token, or any if it has none: what a model has
    learned is calibration data of its own kind, as in LLM-QAT (https://arxiv.org/abs/2305.17888). For models that are called
    as those of transformers are, with or without a cache; FewbitError for others.
    """
    generator = torch.Generator().manual_seed(seed)
    where = f"own_windows: this {type(model).__name__}"
    first = _random_tokens(getattr(model, "config", None), (count, 1), generator, where)
    # All at once: a step reads all weights, for one window or for many.
    with evaluating(model):
        tokens = _continued(model, first, length, generator, where)
    return [{"input_ids": rows} for rows in tokens.split(OWN_BATCH)]


@torch.no_grad()
def _continued(model: nn.Module, tokens: Tensor, length: int, generator: torch.Generator, where: str) -> Tensor:
    device = next(model.parameters()).device
    instead = "calibrate with a text or with random tokens"
    cache: Any = None
    for _ in range(length - tokens.shape[1]):
        given = tokens if cache is None else tokens[:, -1:]
        try:
            output = model(input_ids=given.to(device), past_key_values=cache, use_cache=True)
        # A model raises anything on inputs it was not made for.
        except Exception as error:
            raise FewbitError(
                f"{where} raised {type(error).__name__} on {list(given.shape)} tokens: {error}"
            ) from error
        logits, cache = getattr(output, "logits", None), getattr(output, "past_key_values", None)
        if not isinstance(logits, Tensor):
            raise FewbitError(f"{where} returned no logits: it is no language model; {instead}.")
        likely = logits[:, -1].float().softmax(-1).cpu()
        if not bool(likely.isfinite().all()):
            raise FewbitError(f"{where} returned logits with NaN or infinity: load it in float32, or {instead}.")
        tokens = torch.cat([tokens, torch.multinomial(likely, 1, generator=generator)], 1)
    return tokens.to(device)


def _random_tokens(config: Any, shape: tuple[int, int], generator: torch.Generator, where: str) -> Tensor:
    """Tokens drawn at random, the first of each row the begin token if there is one."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise FewbitError(f"{where}: a {type(config).__name__} has no vocab_size: it is no language model.")
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, int):
        tokens[:, 0] = begin
    return tokens


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder; FewbitError if there is none, UnsupportedError without transformers."""
    return _read(folder, "AutoTokenizer", "tokenizer")


def _read(folder: str | Path, cls: str, what: str) -> Any:
    """What one of transformers' Auto classes makes of a folder."""
    try:
        import transformers
    except ImportError:
        raise UnsupportedError(f"{folder}: reading it needs transformers: pip install 'fewbit[hf]'.") from None
    try:
        return getattr(transformers, cls).from_pretrained(folder, local_files_only=True)
    # Whatever transformers makes of files that are missing or damaged.
    except Exception as error:
        raise FewbitError(f"{folder}: has no {what} that transformers can read: {error}") from error


def text_task(folder: str | Path, file: str | Path, count: int = WINDOWS, length: int = LENGTH) -> Task:
    """The float language model of a folder, judged by a text: its score is the mean log-likelihood of a token, in nats.

    A drop of 0.01 is a perplexity that is 1.0 % larger. A window is one example, so that intervals are those of windows.
    """
    windows = read_windows(folder, file, count, length)
    model = load_task(folder).model

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> Tensor:
        # One window at a time: logits are large.
        scores = []
        for window in windows:
            logits = model(**window).logits[0, :-1].float()
            scores.append(-nn.functional.cross_entropy(logits, window["input_ids"][0, 1:]))
        return torch.stack(scores)

    return Task(model=model, calibration=windows, evaluate=evaluate, example_inputs=windows[0])
