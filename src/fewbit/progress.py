"""A progress bar for what takes longer than two seconds; nothing where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
PATIENCE = 2.0  # seconds before a bar appears
_open: list[Progress] = []  # loops inside loops share one display: a terminal shows only one at a time


def progress(
    items: Iterable[T], what: str, status: Callable[[], str] | None = None, total: int | None = None
) -> Iterator[T]:
    """The items, with a bar named ``what`` on standard error once PATIENCE is over.

    ``status``: what to write beside the bar instead, asked for at each item. ``total``: how many items there are, if they do
    not say it themselves.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    display = _open[0] if _open else Progress(console=console, transient=True)
    _open.append(display)
    task = display.add_task(what, total=len(items) if isinstance(items, Sized) else total, visible=False)
    start = time.monotonic()
    try:
        for done, item in enumerate(items):
            if time.monotonic() - start > PATIENCE:
                display.start()
                words = what if status is None else status()
                display.update(task, completed=done, visible=True, description=words)
            yield item
    finally:
        display.remove_task(task)
        _open.pop()
        if not _open:
            display.stop()
