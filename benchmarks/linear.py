"""How fast is one linear layer without bias, ``[M, K] x [N, K]``, beside what PyTorch users have today?

    python benchmarks/linear.py [--quick] [--isa avx2] [--threads 1 2]

All candidates in one process, in turns of 20 ms; medians. Activations come as float32 and go as float32 (bfloat16 for the two
kernels of torch that want that): quantizing them is part of the time. A layer whose float weights are beyond the cache
is called on copies of its weights in rotation, more than COLD bytes of them, so that every candidate reads its weights from
memory, as in a model. ``GB/s`` counts weights and scales once a call; ``stream`` is what it is of the bandwidth of plain
reading, the fastest of several loops, which takes its turns too. ``error`` is relative to FP32: all compute the same.

llama.cpp: ggml_mul_mat, called through ctypes in the library of the package xllamacpp, with the buffer type and with it the
weight layout that llama.cpp chooses. That wheel is compiled for AVX2, also on better CPUs: ``isa`` says what each row ran with.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from measure import STREAM_BYTES, in_turns, options, stream_read, write
from peers import LINEAR, Layer

ROWS = (1, 4, 16, 128, 512)
SHAPES = ((768, 768), (3072, 768), (4096, 4096), (11008, 4096))  # N, K
COLD = 64 << 20  # twice the 32 MB of L3 of the machine this was made for; three times as much measured no slower there
SECONDS = 0.3  # a cell


def made(name: str, weight: torch.Tensor, cold: bool) -> list[Layer]:
    """The layer, and as many copies as it takes to be beyond the cache."""
    layers = [LINEAR[name](weight)]
    while cold and sum(layer.nbytes for layer in layers) <= COLD:
        layers.append(LINEAR[name](weight))
    return layers


def measure(
    weight: torch.Tensor, rows: tuple[int, ...], seconds: float, read: Callable[[], Any]
) -> list[dict[str, Any]]:
    count, columns = weight.shape
    cold = weight.nbytes > COLD // 2
    candidates = {}
    for name in LINEAR:
        try:
            candidates[name] = made(name, weight, cold)
        except ImportError as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
    results = []
    for m in rows:
        x = torch.randn(m, columns)
        expected = x @ weight.T
        calls = {name: [layer.bind(x) for layer in layers] for name, layers in candidates.items()}
        errors = {}
        for name, copies in calls.items():
            found = torch.as_tensor(copies[0]()).float()
            errors[name] = float((found - expected).norm() / expected.norm())
        times = in_turns(calls | {"streaming read": [read]}, seconds)
        stream = STREAM_BYTES / times.pop("streaming read")
        for name, time in times.items():
            layer = candidates[name][0]
            results.append(
                {
                    "threads": torch.get_num_threads(),
                    "M": m,
                    "N": count,
                    "K": columns,
                    "what": name,
                    "isa": layer.isa,
                    "ms": 1e3 * time,
                    "GOPS": 2e-9 * m * count * columns / time,
                    "x FP32": times["torch FP32"] / time,
                    "GB/s": 1e-9 * layer.nbytes / time,
                    "stream": layer.nbytes / time / stream if cold else None,
                    "stream GB/s": 1e-9 * stream,
                    "weights MB": 1e-6 * layer.nbytes,
                    "copies": len(candidates[name]),
                    "error": errors[name],
                }
            )
    return results


@torch.inference_mode()
def main() -> None:
    chosen = options(__doc__)
    torch.manual_seed(0)
    results = []
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        read = stream_read()
        for n, k in SHAPES[:1] if chosen.quick else SHAPES:
            print(f"{threads} threads, N {n}, K {k}", file=sys.stderr)
            weight = torch.randn(n, k) / k**0.5
            results += measure(weight, (1, 16) if chosen.quick else ROWS, 0.05 if chosen.quick else SECONDS, read)
            gc.collect()
    write("linear", results, keep=not chosen.quick)


if __name__ == "__main__":
    main()
