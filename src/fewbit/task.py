"""A task: the model, the data and the score that a whole job needs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewbit.errors import FewbitError, UnsupportedError


@dataclass(frozen=True)
class Task:
    """What ``task()`` in a task.py returns; the arguments of ``autoquantize``."""

    model: nn.Module
    calibration: Any = None
    evaluate: Callable[[nn.Module], Any] | None = None
    example_inputs: Any = None


def load_task(path: str | Path) -> Task:
    """The task of a Python file with a function ``task()``, or of a Hugging Face folder (config.json and safetensors).

    A folder gives a model alone. FewbitError if there is no such file or function, UnsupportedError without transformers.
    """
    path = Path(path)
    if path.is_dir():
        return Task(model=_hugging_face(path))
    if not path.is_file():
        raise FewbitError(f"{path}: no such file; give a task.py or a Hugging Face folder.")
    spec = importlib.util.spec_from_file_location(f"fewbit_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FewbitError(f"{path}: not a Python file; give a task.py or a Hugging Face folder.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        function = getattr(module, "task", None)
        if function is None:
            raise FewbitError(f"{path}: has no function task(); it must define `def task() -> fewbit.Task`.")
        task = function()
    except FewbitError:
        raise
    # The file is the user's: whatever it raises is about it.
    except Exception as error:
        raise FewbitError(f"{path}: raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not isinstance(task, Task):
        raise FewbitError(f"{path}: task() returned a {type(task).__name__}; it must return a fewbit.Task.")
    return task


def _hugging_face(folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise FewbitError(f"{folder}: has no config.json; give a task.py or a Hugging Face folder.")
    try:
        import transformers
    except ImportError:
        raise UnsupportedError(f"{folder}: reading it needs transformers: pip install 'fewbit[hf]'.") from None
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
    except (ValueError, AttributeError, OSError) as error:
        raise FewbitError(f"{config}: not a Hugging Face configuration: {error}.") from None
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise UnsupportedError(
            f"{config}: architecture {names[0]!r} is not in transformers {transformers.__version__}."
        )
    try:
        model: nn.Module = cls.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise FewbitError(f"{folder}: transformers cannot load it: {error}") from error
    return model.eval()
