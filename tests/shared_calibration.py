"""Run by torchrun: quantizes models and folders with a part of the calibration batches in each process; saves what rank 0
got, and the folders as they are.

torchrun ... shared_calibration.py FOLDER             a model in FOLDER/hf
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import ConvNet, Tagger, language_model, randomize_norms
from torch import nn

import fewbit
from fewbit import processes, streaming


def cases() -> dict[str, tuple[nn.Module, str, list[object]]]:
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    cnn, tagger = ConvNet(), Tagger()
    randomize_norms(cnn)
    images: list[object] = [torch.randn(4, 3, 8, 8, generator=random) for _ in range(4)]
    words: list[object] = [torch.randint(0, 300, (3, 7), generator=random) for _ in range(4)]
    tokens: list[object] = [{"input_ids": torch.randint(3, 192, (2, 24), generator=random)} for _ in range(4)]
    llama = language_model(dtype=torch.float32)
    return {
        "cnn": (cnn.eval(), "int8-static", images),
        "tagger": (tagger.eval(), "int4-dynamic", words),
        "llama": (llama, "int4-gptq", tokens),
        "importance": (llama, "int4-weight-only", tokens),
    }


FOLDERS = (("plain", "int4-weight-only", False), ("informed", "int4-weight-only", True), ("walked", "int4-gptq", True))


def main() -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    for name, (model, recipe, batches) in cases().items():
        with processes.sharing(dist.group.WORLD):
            part = processes.part(batches)
        quantized = fewbit.quantize(model, recipe, part, group=dist.group.WORLD)
        same: list[dict[str, torch.Tensor] | None] = [None] * count
        dist.all_gather_object(same, dict(quantized.state_dict()))
        assert all(
            other is not None and all(torch.equal(x, other[key]) for key, x in (same[0] or {}).items())
            for other in same
        )
        if rank == 0:
            torch.save(dict(quantized.state_dict()), Path(sys.argv[1]) / f"{name}-{count}.pt")
        if name == "llama":
            own = part
    streaming.FILE = 8_000
    for name, recipe, data in FOLDERS:
        out = f"{sys.argv[1]}/{name}-{count}"
        batches = own if data else None
        fewbit.quantize_folder(f"{sys.argv[1]}/hf", out, recipe, calibration=batches, group=dist.group.WORLD)
    dist.destroy_process_group()


main()
