"""Work that several processes share, each with its part of the calibration data, in the order of their ranks.

A process is alone unless ``sharing`` says otherwise. What the processes do in ``sharing`` must be the same but for the data.
"""

from __future__ import annotations

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


def united(part: Mapping[str, T]) -> dict[str, T]:
    """The entries of all processes."""
    return {key: value for one in gathered(part) for key, value in one.items()}
