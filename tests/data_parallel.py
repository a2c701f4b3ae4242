"""Run by torchrun: trains a student on parts of each batch, one a process, by DDP and then by FSDP; prints the losses."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import fewbit


def main() -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    recipe = replace(fewbit.load_recipe("int4-int4-static"), ends=None)
    for shard in (False, True):
        student: nn.Module = fewbit.prepare_qat(model, recipe, batches)
        if shard:
            mesh = dist.device_mesh.init_device_mesh("cpu", (count,))
            for layer in student.children():
                if next(layer.parameters(), None) is not None:
                    fully_shard(layer, mesh=mesh)
            fully_shard(student, mesh=mesh)
        else:
            student = nn.parallel.DistributedDataParallel(student)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        for step in range(6):
            optimizer.zero_grad()
            loss = (student(batches[step % 3].chunk(count)[rank]) - 1).square().mean()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            if rank == 0:
                print(float(total / count))
    dist.destroy_process_group()


main()
