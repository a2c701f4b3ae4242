"""A progress bar for what takes longer than two seconds; nothing where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
PATIENCE = 2.0  # seconds before a bar appears


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a bar named ``what`` on standard error once PATIENCE is over."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    with Progress(console=console, transient=True, disable=False) as bar:
        task = bar.add_task(what, total=total, visible=False)
        for done, item in enumerate(items):
            if time.monotonic() - start > PATIENCE:
                bar.update(task, completed=done, visible=True)
            yield item
