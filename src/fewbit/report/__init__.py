"""Reports for people: one self-contained HTML file from the JSON of an answer or a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from fewbit.errors import FewbitError
from fewbit.report.figures import drops


def write_report(data: Mapping[str, Any], path: str | Path) -> Path:
    """Render ``Answer.to_json()`` or ``Comparison.to_json()`` to ``path``; returns it.

    FewbitError if ``data`` is neither, or the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fewbit", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    try:
        text = environment.get_template("report.html").render(**data, drops=drops)
    except jinja2.UndefinedError as error:
        raise FewbitError(f"not the report of an answer or a comparison: {error}.") from None
    return write_text(path, text)


def write_text(path: str | Path, text: str) -> Path:
    """Write a file, and the folders above it; returns its path. FewbitError if it cannot be written."""
    path = Path(path)
    make_folder(path.parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FewbitError(f"{path}: cannot be written: {error.strerror}.") from None
    return path


def make_folder(path: str | Path) -> None:
    """Make a folder, and those above it. FewbitError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FewbitError(f"{path}: cannot be made: {error.strerror}. Give a folder that you may write to.") from None
