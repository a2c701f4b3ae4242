"""How many tokens a second does a language model decode, one at a time?

    python benchmarks/decode.py [--quick] [--isa avx2] [--threads 1 2] [--compile]

Two models: one of the shape of Llama-3.2-1B with random weights (a vocabulary of 32,000, its output layer its own), and
SmolLM2-135M. A prompt of 16 tokens, then 32 greedy ones; medians of the steps. All torch models go through the same loop:
Hugging Face's forward with a static cache. Models this large are measured one after the other; FP32 comes first and last, so
that a drift of the machine shows. ``stream`` is the share of the bandwidth of plain reading in this run that the weights read
for each token make up. Methods are plain rounding: the codes do not change the speed.

llama.cpp: the server in the package xllamacpp, on a GGUF file written here from the same weights, every matrix in Q4_0; its own
timings, sampling included. That wheel is compiled for AVX2, also on better CPUs.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import fewbit
from fewbit.targets import tensor_bytes
from measure import ISA, example, options, stream_bandwidth, write
from peers import int4_dynamic, llama_cpp_decode, rounded, torch_ao_dynamic, write_gguf

PROMPT = list(range(100, 116))
TOKENS, TOKENS_FP32 = 32, 12


def llama_1b(quick: bool) -> LlamaForCausalLM:
    """The shape of Llama-3.2-1B; one block of random numbers repeated."""
    hidden, layers, inner = (256, 2, 512) if quick else (2048, 16, 8192)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=32000,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    block = 0.02 * torch.randn(1 << 20)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            for part in parameter.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    return model.eval()


def smollm2(quick: bool) -> LlamaForCausalLM:
    return example("smollm2").model


MODELS: dict[str, Callable[[bool], LlamaForCausalLM]] = {"Llama 1B": llama_1b, "SmolLM2-135M": smollm2}


@torch.no_grad()
def decode(model: nn.Module, count: int, compiled: bool) -> float:
    """Median seconds a token."""
    cache = StaticCache(config=model.config, max_cache_len=len(PROMPT) + count + 1)
    step = torch.compile(model, dynamic=False) if compiled else model
    logits = model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True).logits
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        token = logits[:, -1:].argmax(2)
        logits = step(input_ids=token, past_key_values=cache, use_cache=True).logits
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first compile, allocate and choose algorithms


def read_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the weights that one token reads: all but the table of embeddings, unless it is the output layer too."""

    def places(module: nn.Module) -> set[int]:
        return {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    table = model.get_input_embeddings()
    apart = places(table).isdisjoint(places(model.get_output_embeddings()))
    packed = [layer.weight() for layer in model.modules() if callable(getattr(layer, "weight", None))]  # torch.ao
    return tensor_bytes(model) - apart * tensor_bytes(table) + sum(weight.nbytes for weight in packed)


def quantized(recipe: fewbit.Recipe) -> Callable[[LlamaForCausalLM], Any]:
    # Calibration shows the graph, so that every transform applies; these recipes need no ranges.
    return lambda model: fewbit.quantize(model, rounded(recipe), calibration=[{"input_ids": torch.tensor([PROMPT])}])


CANDIDATES: dict[str, Callable[[LlamaForCausalLM], Any]] = {
    "torch FP32": lambda model: model,
    "torch BF16": lambda model: model.bfloat16(),
    "torch.ao int8": lambda model: torch_ao_dynamic(model, inplace=True),
    "fewbit int8-dynamic": quantized(fewbit.load_recipe("int8-dynamic")),
    "fewbit int4-dynamic": quantized(int4_dynamic()),
}


def measured(name: str, chosen: Any) -> Iterator[tuple[int, str, str, float, float]]:
    """Threads, candidate, instruction set, seconds a token and bytes that it reads."""
    for what in (*CANDIDATES, "torch FP32"):
        print(f"{name}: {what}", file=sys.stderr)
        model = CANDIDATES[what](MODELS[name](chosen.quick))
        gc.collect()
        count = 4 if chosen.quick else TOKENS_FP32 if what == "torch FP32" else TOKENS
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            yield threads, what, ISA, decode(model, count, False), read_bytes(model)
            if chosen.compile and what.startswith("fewbit"):
                yield threads, f"{what}, compiled", ISA, decode(model, count, True), read_bytes(model)
        del model
        gc.collect()
    print(f"{name}: llama.cpp Q4_0", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        nbytes = write_gguf(MODELS[name](chosen.quick), file)
        gc.collect()
        for threads in chosen.threads:
            seconds = llama_cpp_decode(file, PROMPT, 4 if chosen.quick else TOKENS, threads)
            yield threads, "llama.cpp Q4_0", "avx2", seconds, nbytes


def main() -> None:
    chosen = options(__doc__, "compile")
    torch.manual_seed(0)
    stream = {}
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        stream[threads] = stream_bandwidth()
    results = []
    for name in MODELS:
        first: dict[int, float] = {}  # threads to FP32's seconds
        for threads, what, isa, seconds, nbytes in measured(name, chosen):
            row = {"threads": threads, "model": name, "what": what, "isa": isa, "tokens/s": 1 / seconds}
            row["x FP32"] = first.setdefault(threads, seconds) / seconds
            row |= {"ms": 1e3 * seconds, "weights MB": 1e-6 * nbytes, "stream": nbytes / seconds / stream[threads]}
            results.append(row)
    write("decode", results, keep=not chosen.quick)


if __name__ == "__main__":
    main()
