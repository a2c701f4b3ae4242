"""Figures of a report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def drops(trials: Sequence[Mapping[str, Any]], max_drop: float) -> str:
    """The drop of each trial with its 95 % interval, and the budget as a line. Empty if no trial has a drop."""
    measured = [trial for trial in trials if trial["drop"] is not None and trial["verdict"] is not None]
    if not measured:
        return ""
    # Imported here: it takes half a second, and few who import fewbit write reports.
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.4 * len(measured)), layout="constrained")
    axes = figure.add_subplot()
    for row, trial in enumerate(measured):
        low, high = trial["interval"] or (trial["drop"], trial["drop"])
        axes.plot([low, high], [row, row], color="#5b6770", linewidth=2)
        axes.plot(trial["drop"], row, "o", color="#1a7f4b" if trial["verdict"]["verdict"] == "pass" else "#b3261e")
    axes.axvline(max_drop, color="#8a6d00", linestyle="--")
    axes.axvline(0, color="#d9dee2", zorder=0)
    axes.set_yticks(range(len(measured)), [trial["recipe"] for trial in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_xlabel("drop of the score, with its 95 % interval; dashed: the budget")
    text = io.StringIO()
    # A fixed salt and no date: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fewbit"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
