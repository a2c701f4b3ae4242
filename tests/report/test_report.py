"""write_report: one self-contained file, escaped, from JSON alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import fewbit
from fewbit import Budget, FewbitError
from fewbit.report import write_report


@pytest.fixture
def answer(mlp: nn.Module, vectors: list[Tensor]) -> dict[str, Any]:
    """An answer's JSON after a round trip through text; one recipe could not be tried."""
    found = fewbit.autoquantize(
        mlp,
        evaluate=lambda _: [0.0, 1.0, 1.0],
        budget=Budget(0.9),
        example_inputs=vectors[0],
        recipes=["int8-dynamic", "int8-static"],
    )
    data: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    return data


@pytest.fixture
def comparison(mlp: nn.Module, vectors: list[Tensor]) -> dict[str, Any]:
    found = fewbit.compare(mlp, fewbit.quantize(mlp, "int8-dynamic"), vectors)
    data: dict[str, Any] = json.loads(json.dumps({**found.to_json(), "text": str(found)}))
    return data


def test_answer(answer: dict[str, Any], tmp_path: Path) -> None:
    path = write_report(answer, tmp_path / "deep" / "report.html")
    text = path.read_text()
    assert path == tmp_path / "deep" / "report.html" and text.rstrip().endswith("</html>")
    assert f'<span class="verdict {answer["verdict"]}">' in text
    assert "not tried: it needs calibration batches" in text and answer["machine"]["cpu"] in text
    assert len(re.findall("<tr", text)) == 1 + len(answer["trials"])


def test_comparison(comparison: dict[str, Any], tmp_path: Path) -> None:
    text = write_report(comparison, tmp_path / "report.html").read_text()
    assert "Layers, worst first" in text and "speed of float" in text
    assert all(f"<td>{layer['name']}</td>" in text for layer in comparison["layers"])


def test_nothing_is_fetched_from_elsewhere(answer: dict[str, Any], tmp_path: Path) -> None:
    text = write_report(answer, tmp_path / "report.html").read_text()
    # The addresses in a figure's header are names: what is fetched stands in one of these.
    assert not re.search(r"""(src|href)=["']https?:|url\(https?:|<script|<link|<img|@import""", text)


def test_text_is_escaped(comparison: dict[str, Any], tmp_path: Path) -> None:
    comparison["layers"][0]["name"] = "<script>alert(1)</script>"
    comparison["text"] = "a < b & c"
    text = write_report(comparison, tmp_path / "report.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "a &lt; b &amp; c" in text


@pytest.mark.parametrize(
    "data", [{}, {"trials": [{}]}, {"layers": []}], ids=["empty", "half-answer", "half-comparison"]
)
def test_other_data_are_refused(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match="not the report of an answer or a comparison"):
        write_report(data, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_file_that_cannot_be_written(answer: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FewbitError, match="file: cannot be made"):
        write_report(answer, tmp_path / "file" / "report.html")
