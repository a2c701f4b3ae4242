"""A module imports only from those above it; siblings leave each other alone; optional packages wait until needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewbit

ROOT = Path(fewbit.__file__).parent
ORDER = (
    ("errors",),
    ("formats",),
    ("spec",),
    ("qtensor",),
    ("ops",),
    ("observers", "methods"),
    ("graph",),
    ("transforms", "nn"),
    ("plan",),
    ("batches", "divergence", "processes", "progress", "tensorfile"),
    ("calibration",),
    ("correction", "ranges"),
    ("sensitivity", "sequential"),
    ("pipeline",),
    ("training",),
    ("lowering",),
    ("source",),
    ("placing",),
    ("targets",),
    ("verify",),
    ("distillation",),
    ("hardware",),
    ("report",),
    ("deploy",),
    ("search",),
    ("streaming",),
    ("task",),
    ("texts",),
    ("huggingface", "kvcache", "generation"),
    ("",),  # the package itself
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
SIBLINGS = {"observers", "methods", "transforms", "nn"}
BANNED = {"utils", "util", "common", "helpers", "helper", "core", "base", "misc", "v2"}
REQUIRED = {"torch", "numpy", "safetensors", "rich", "typer", "jinja2", "matplotlib", "tomli", "fewbit"}
FILES = sorted(ROOT.rglob("*.py"))


def part(module: str) -> str:
    """The part of fewbit that a module is of: "" for the package itself."""
    return [*module.split("."), ""][1]


def module_of(path: Path) -> str:
    names = ("fewbit", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """The modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.If):  # version checks
            nodes = [*nodes, *node.body, *node.orelse]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_up_only(path: Path) -> None:
    own = part(module_of(path))
    assert own in RANK, f"{own}: add it to ORDER"
    for module in imports(path):
        if module.split(".")[0] != "fewbit":
            continue
        other = part(module)
        if other != own:
            assert RANK[other] < RANK[own], f"{path} imports {module}"
            assert not {own, other} <= SIBLINGS, f"{path} imports its sibling {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_not_imported_on_loading(path: Path) -> None:
    for module in imports(path, top_level=True):
        name = module.split(".")[0]
        assert name in REQUIRED or name in sys.stdlib_module_names, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_have_speaking_names(path: Path) -> None:
    assert not set(path.relative_to(ROOT).with_suffix("").parts) & BANNED


def test_every_part_is_in_the_order() -> None:
    assert {part(module_of(path)) for path in FILES} == set(RANK)


def test_import_of_fewbit_is_light() -> None:
    script = (
        "import sys, fewbit; heavy = ('transformers', 'onnx', 'onnxruntime', 'openvino', 'scipy', 'matplotlib', 'typer'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]" and result.stderr == ""
