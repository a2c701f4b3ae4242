"""Work that several processes share, each with its part of the calibration data, in the order of their ranks.

A process is alone unless ``sharing`` says otherwise. What the processes do in ``sharing`` must be the same but for the data;
tensors go from one to the other on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from fewbit.errors import FewbitError

T = TypeVar("T")
_group: ContextVar[Any] = ContextVar("group", default=None)


@contextmanager
def sharing(group: Any) -> Iterator[None]:
    """What is done here is done by all processes of a group of torch.distributed; None: by each for itself.

    FewbitError for a group that has no backend for the CPU.
    """
    backends = "" if group is None else dist.get_backend_config(group)
    if group is not None and "cpu:" not in backends:
        raise FewbitError(
            f"group: found backends {backends}, needs one for the CPU: torch.distributed.new_group(backend='gloo')."
        )
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


@contextmanager
def launched() -> Iterator[Any]:
    """The processes that torchrun started this one with, as a group that talks over gloo; None if there are no others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield None
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # a process may wait for a large file of another
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


def agree(failure: Exception | None) -> None:
    """Raises in all processes if one has failed: its own failure, or in the others a FewbitError that tells it."""
    texts = gathered("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text:
            raise FewbitError(f"process {rank} of {count()}: {text}")


@contextmanager
def together() -> Iterator[None]:
    """What fails here in one process raises in all, so that none waits in vain; there is no other exchange in it."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure)


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
