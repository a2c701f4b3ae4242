"""The C++ kernels against plain loops, without torch: here, with sanitizers, and the ARM ones in an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "csrc"
SANITIZED = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
EMULATED = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    "CMAKE_EXE_LINKER_FLAGS": "-static",
}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def run(*command: str | Path) -> str:
    # GCC's bug 110027: with that check AddressSanitizer does not align vectors of 64 bytes.
    environment = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"} | os.environ
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run(command, **output, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout.strip().splitlines()[-1]


def build(directory: Path, **variables: str) -> Path:
    """The test's program, compiled as the extension is, but for CMake's variables."""
    options = [f"-D{name}={value}" for name, value in variables.items()]
    run("cmake", "-S", SOURCE, "-B", directory, "-DFEWBIT_KERNELS_TEST=ON", *options)
    run("cmake", "--build", directory, "--parallel", "2")
    return directory / "kernels_test"


def test_here(tmp_path: Path) -> None:
    need("cmake", os.environ.get("CXX", "c++"))
    assert run(build(tmp_path), "500").endswith("scalar, ok")


@pytest.mark.slow
def test_with_sanitizers(tmp_path: Path) -> None:
    need("cmake", os.environ.get("CXX", "c++"))
    program = build(tmp_path, CMAKE_BUILD_TYPE="Debug", CMAKE_CXX_FLAGS_DEBUG=SANITIZED)
    assert run(program, "10000").endswith("scalar, ok")


@pytest.mark.slow
def test_arm(tmp_path: Path) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("test_here runs them")
    need("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
    program = build(tmp_path, **EMULATED)
    assert run("qemu-aarch64", "-cpu", "max", program, "1000") == "1000 problems, neon_i8mm, neon_dotprod, scalar, ok"
