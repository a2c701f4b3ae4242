"""Quantizing a language model folder to folder: minutes, peak memory, size, tokens a second; the same files after a kill.

    python benchmarks/llm_stream.py --shape 7b --folder /path/with/20GB

Random weights in the shapes of Llama 7B, 3B, 1B or 0.5B, bfloat16, in shards of at most 2 GB. The run that is killed and called
again takes as long once more; --once leaves it out. Decoding: TOKENS tokens one after the other, beside transformers with the
bfloat16 model, each in a fresh process. Nothing is written to results/ but for the 7B.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from fewbit.tensorfile import TensorWriter
from measure import write

# vocabulary, hidden, intermediate, layers, heads, key-value heads
SHAPES = {
    "7b": (32000, 4096, 11008, 32, 32, 32),
    "3b": (32000, 3200, 8640, 26, 32, 32),
    "1b": (32000, 2048, 5632, 22, 32, 4),
    "0.5b": (32000, 1280, 3456, 20, 20, 20),
}
SHARD = 2 * 10**9
ROWS = 2**22  # weights that are drawn at once
TOKENS = 8


def make_model(folder: Path, shape: tuple[int, ...]) -> int:
    """A random Llama in bfloat16 shards; returns its bytes."""
    vocabulary, hidden, inner, layers, heads, kv_heads = shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
    }
    small = hidden // heads * kv_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (small, hidden),
        "self_attn.v_proj": (small, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes.update({f"model.layers.{layer}.{name}.weight": size for name, size in matrices.items()})
    shapes.update({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})
    tensors = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in shapes.items()}
    files: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if sum(tensors[other].nbytes for other in files[-1]) + tensor.nbytes > SHARD:
            files.append([])
        files[-1].append(name)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    places = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        places.update(dict.fromkeys(names, file))
        with TensorWriter(folder / file, {name: tensors[name] for name in names}, {"format": "pt"}) as writer:
            for name in names:
                write_random(writer, name, tensors[name].shape, generator)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def write_random(writer: TensorWriter, name: str, shape: torch.Size, generator: torch.Generator) -> None:
    if len(shape) == 1:
        writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
        return
    step = max(1, ROWS // shape[1])
    for begin in range(0, shape[0], step):
        rows = min(step, shape[0] - begin)
        writer.write(name, torch.randn(rows, shape[1], generator=generator).mul_(0.02).bfloat16(), begin)


def child(source: str, out: str, recipe: str, max_ram: str | None) -> None:
    import fewbit

    began = time.perf_counter()
    fewbit.quantize_folder(source, out, recipe, max_ram=max_ram)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"minutes": seconds / 60, "peak GB": peak / 1e9}))


def decode(folder: str) -> None:
    """Seconds that each token takes after the first."""
    import fewbit

    if (Path(folder) / "plan.json").is_file():
        model = fewbit.load(folder)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    times = []
    tokens, cache = torch.tensor([[1, 2, 3, 4]]), None
    with torch.inference_mode():
        for _ in range(TOKENS + 1):
            began = time.perf_counter()
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(2)
            times.append(time.perf_counter() - began)
    print(json.dumps({"tokens/s": 1 / statistics.median(times[1:])}))


def hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def written(folder: Path) -> int:
    """Bytes on the disk: what is not written yet of a file takes none."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir()) if folder.is_dir() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path("build/llm_stream"))
    parser.add_argument("--recipe", default="int4-compact")
    parser.add_argument("--max-ram", default="4GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--once", action="store_true", help="without the run that is killed")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--decode", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.decode:
        decode(chosen.decode)
        return
    if chosen.child:
        child(*chosen.child, chosen.max_ram)
        return
    shape = SHAPES[chosen.shape]
    chosen.folder.mkdir(parents=True, exist_ok=True)
    vocabulary, hidden, inner, layers, heads, kv_heads = shape
    block = 2 * hidden * hidden * (1 + kv_heads / heads) + 3 * hidden * inner
    needed = 2.0 * (2 * vocabulary * hidden + layers * block) * (1.3 if chosen.once else 1.6)
    source = chosen.folder / f"llama-{chosen.shape}"
    free = shutil.disk_usage(chosen.folder).free + written(source)
    if free < needed:
        sys.exit(
            f"{chosen.folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed; give another --folder"
        )
    if not (source / "config.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        make_model(source, shape)
    command = [sys.executable, __file__, "--max-ram", chosen.max_ram, "--child", str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
    whole, killed = chosen.folder / "whole", chosen.folder / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    result = subprocess.run(
        [*command, str(whole), chosen.recipe], check=True, capture_output=True, text=True, env=environment
    )
    figures = {"model": f"llama {chosen.shape}", "recipe": chosen.recipe, "threads": chosen.threads}
    figures.update(json.loads(result.stdout), **{"source GB": written(source) / 1e9, "out GB": written(whole) / 1e9})
    if not chosen.once:
        process = subprocess.Popen([*command, str(killed), chosen.recipe], stdout=subprocess.DEVNULL, env=environment)
        while written(killed) < written(whole) / 2 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        figures["left by the killed run GB"] = written(killed) / 1e9
        began = time.perf_counter()
        subprocess.run([*command, str(killed), chosen.recipe], check=True, stdout=subprocess.DEVNULL, env=environment)
        figures["minutes after the kill"] = (time.perf_counter() - began) / 60
        figures["same files"] = hashes(whole) == hashes(killed)
    for what, folder in (("BF16 tokens/s", source), ("tokens/s", whole)):
        command = [sys.executable, __file__, "--decode", str(folder)]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        figures[what] = json.loads(result.stdout.splitlines()[-1])["tokens/s"]
    write("llm_stream", [figures], keep=chosen.shape == "7b")


if __name__ == "__main__":
    main()
