"""The library of compiled kernels, built from ``csrc/``: it registers them with torch under the operators defined here.

Without it the operators run in plain torch, and the first use says so. FEWBIT_KERNELS=0 leaves it out without a word.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class KernelWarning(UserWarning):
    """The compiled kernels are missing or do not load."""


def _load(folders: Iterable[str]) -> str | None:
    """Loads the library from the first folder that has it. None if that is done, else why not: "" if nobody wants it."""
    if os.environ.get("FEWBIT_KERNELS") == "0":
        return ""
    found = [path for folder in folders if (path := Path(folder, "_kernels.so")).exists()]
    if not found:
        return "this installation was built without a C++ compiler, or the kernels did not compile"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"with torch {torch.__version__} they do not load: {error.__cause__ or error}"
    return None


# An editable install keeps what it has built in another place than the sources: both are in the package's path.
_trouble = _load(sys.modules[__package__].__path__)
LOADED = _trouble is None


def isa() -> str:
    """The instruction set that the kernels use on this machine; "reference" without kernels."""
    return str(torch.ops.fewbit.isa()) if LOADED else "reference"


def remind(x: Tensor) -> None:
    """Called where plain torch does what a kernel should do: warns once if that is so because there are no kernels."""
    global _trouble
    if _trouble and x.is_cpu:
        trouble, _trouble = _trouble, ""
        warnings.warn(
            f"fewbit runs without its compiled kernels ({trouble}). Results are the reference's, but quantized layers are "
            "mostly slower than float ones. Install a C++ compiler (g++ or clang++) and fewbit again "
            "(pip install --force-reinstall --no-deps --no-cache-dir ...), or set FEWBIT_KERNELS=0 to do without.",
            KernelWarning,
            stacklevel=2,
        )
