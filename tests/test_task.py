"""load_task: Python files and Hugging Face folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fewbit import FewbitError, Task, UnsupportedError, load_task

GOOD = "import fewbit\nfrom torch import nn\n\ndef task():\n    return fewbit.Task(nn.Linear(2, 2))\n"


def test_task_file(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(GOOD)
    task = load_task(tmp_path / "task.py")
    assert isinstance(task, Task) and task.calibration is None and task.evaluate is None
    assert load_task(str(tmp_path / "task.py")) is not task


def test_task_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_task.py").write_text("SIZE = 3\n")
    text = GOOD.replace("nn.Linear(2, 2)", "nn.Linear(neighbour_of_task.SIZE, 2)")
    (tmp_path / "task.py").write_text(f"import neighbour_of_task\n{text}")
    before = list(sys.path)
    assert load_task(tmp_path / "task.py").model.get_parameter("weight").shape == (2, 3)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("task.py", "x = 1\n", r"task.py: has no function task\(\)"),
        ("task.py", "def task():\n    return 3\n", r"task.py: task\(\) returned a int; it must return a fewbit.Task"),
        ("task.txt", GOOD, "task.txt: not a Python file"),
        ("task.py", "def task(:\n", r"task.py: raised SyntaxError: "),
        ("task.py", "def task():\n    raise OSError('no data')\n", r"task.py: raised OSError: no data"),
    ],
    ids=["no-function", "other-result", "no-python", "syntax-error", "raises"],
)
def test_files_that_are_no_tasks(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    before = list(sys.path)
    with pytest.raises(FewbitError, match=message):
        load_task(tmp_path / name)
    assert sys.path == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=r"none.py: no such file; give a task.py or a Hugging Face folder"):
        load_task(tmp_path / "none.py")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=r"has no config.json"):
        load_task(tmp_path)


def test_folder_of_an_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(UnsupportedError, match="architecture 'NoSuchModel' is not in transformers"):
        load_task(tmp_path)


def test_folder_with_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FewbitError, match=r"config.json: not a Hugging Face configuration"):
        load_task(tmp_path)
