"""The compiled kernels are found and used; without them one warning is given and the reference computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.ops import native

SCRIPT = """
import torch
{before}
import fewbit
from fewbit.ops import native
model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)).eval()
torch.nn.init.eye_(model[0].weight)
model = fewbit.quantize(model, "int8-dynamic")
x = torch.arange(256.0) - 128
with torch.no_grad():
    print(native.LOADED, native.isa(), all(torch.allclose(model(x), x, atol=1) for _ in range(3)))
"""
BROKEN = """
def fail(path):
    raise OSError("undefined symbol: something")
torch.ops.load_library = fail
"""


def run(before: str = "", **environment: str) -> tuple[list[str], str]:
    """What a process of its own prints (whether loaded, which instruction set, whether it is right), and its warnings."""
    variables = {name: value for name, value in os.environ.items() if name not in ("FEWBIT_KERNELS", "PYTHONWARNINGS")}
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", SCRIPT.format(before=before)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=variables | environment,
    )
    return result.stdout.split(), "\n".join(line for line in result.stderr.splitlines() if "KernelWarning" in line)


def test_with_kernels() -> None:
    if not native.LOADED:
        pytest.skip("fewbit was installed without kernels")
    (loaded, isa, right), warning = run()
    assert (loaded, right) == ("True", "True") and isa not in ("", "reference") and warning == ""


def test_without_kernels_there_is_one_warning() -> None:
    (loaded, isa, right), warning = run(BROKEN)
    assert (loaded, isa, right) == ("False", "reference", "True")
    assert warning.count("KernelWarning") == 1 and "C++ compiler" in warning


def test_kernels_that_are_not_wanted_are_not_missed() -> None:
    (loaded, isa, right), warning = run(FEWBIT_KERNELS="0")
    assert (loaded, isa, right, warning) == ("False", "reference", "True", "")


def test_trouble_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_KERNELS", raising=False)
    assert "compiler" in str(native._load([str(tmp_path)]))
    (tmp_path / "_kernels.so").write_bytes(b"not a library")
    trouble = str(native._load([str(tmp_path / "none"), str(tmp_path)]))
    assert torch.__version__ in trouble and str(tmp_path / "_kernels.so") in trouble


def test_only_what_a_kernel_would_do_gives_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_trouble", "lost")
    native.remind(torch.empty(1, device="meta"))
    with pytest.warns(native.KernelWarning, match="lost") as warnings:
        native.remind(torch.empty(1))
        native.remind(torch.empty(1))
    assert len(warnings) == 1


def test_kernels_are_built_where_there_is_a_compiler() -> None:
    if os.environ.get("FEWBIT_KERNELS") == "0" or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no kernels are expected here")
    assert native.LOADED, native._trouble
