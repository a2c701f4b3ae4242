"""The progress bar: silent where nobody looks, one display for loops inside loops."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import fewbit.progress
from fewbit.progress import progress


class Terminal(Console):
    """A terminal that writes to a string."""

    written = io.StringIO()

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(file=self.written, force_terminal=True, width=80)


def test_silent_where_the_output_is_not_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewbit.progress, "PATIENCE", -1.0)
    assert list(progress(range(3), "working")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_short_loop_shows_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewbit.progress, "Console", Terminal)
    monkeypatch.setattr(fewbit.progress, "PATIENCE", 3600.0)
    monkeypatch.setattr(Terminal, "written", io.StringIO())
    assert list(progress(iter("ab"), "quick")) == ["a", "b"]
    assert Terminal.written.getvalue() == ""


def test_loops_inside_loops_share_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewbit.progress, "Console", Terminal)
    monkeypatch.setattr(fewbit.progress, "PATIENCE", -1.0)
    monkeypatch.setattr(Terminal, "written", io.StringIO())
    seen = [(a, b) for a in progress(range(2), "outer") for b in progress(range(2), "inner")]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
    text = Terminal.written.getvalue()
    assert "outer" in text
    assert text.count("\x1b[?25l") == 1  # a display hides the cursor when it starts
    assert not fewbit.progress._open
