"""Work that several processes share, each with its part of the calibration data, in the order of their ranks.

A process is alone unless ``sharing`` says otherwise. What the processes do in ``sharing`` must be the same but for the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_group: ContextVar[Any] = ContextVar("group", default=None)


@contextmanager
def sharing(group: Any) -> Iterator[None]:
    """What is done here is done by all processes of a group of torch.distributed; None: by each for itself."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


@contextmanager
def launched() -> Iterator[Any]:
    """The processes that torchrun started this one with, as a group that talks over gloo; None if there are no others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes share the work."""
    return 1 if _group.get() is None else dist.get_world_size(_group.get())


def gathered(part: T) -> list[T]:
    """What each process gives, by rank; the same list for all."""
    if count() == 1:
        return [part]
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, part, group=_group.get())
    return parts


def summed(x: Tensor) -> None:
    """Adds up ``x`` of all processes, in place."""
    if count() > 1:
        dist.all_reduce(x, group=_group.get())


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process' work."""
    return items if count() == 1 else items[dist.get_rank(_group.get()) :: count()]


def part(items: Sequence[T]) -> Sequence[T]:
    """Those of the data that are this process' part: in the order of ranks all of them."""
    rank = 0 if count() == 1 else dist.get_rank(_group.get())
    return items[rank * len(items) // count() : (rank + 1) * len(items) // count()]


def is_first() -> bool:
    """Whether this process is the one that does what must be done once."""
    return bool(share([True]))


def united(part: Mapping[str, T]) -> dict[str, T]:
    """The entries of all processes."""
    return {key: value for one in gathered(part) for key, value in one.items()}
