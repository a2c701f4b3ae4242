"""What this machine is: instruction sets, cores, memory, versions, installed extras."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit.errors import FewbitError

# What matters to quantized kernels, by the names that Linux and macOS use.
FEATURES = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EXTRAS = ("transformers", "onnx", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Machine:
    """``cores`` that this process may use, ``memory`` in bytes (0: unknown), ``features`` of FEATURES, ``versions``."""

    cpu: str
    cores: int
    threads: int
    memory: int
    features: tuple[str, ...]
    system: str
    accelerator: str
    versions: dict[str, str]


def probe() -> Machine:
    """Look at this machine."""
    text = _read("/proc/cpuinfo")
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
        if key.strip() == "model name":
            name = value.strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=name,
        cores=cores,
        threads=torch.get_num_threads(),
        memory=_memory(),
        features=tuple(feature for feature in FEATURES if feature in flags),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        accelerator=_accelerator(),
        versions={package: _version(package) for package in ("fewbit", "torch", "numpy", *EXTRAS)},
    )


def resident() -> int:
    """Bytes of memory that this process takes now; where the system does not say, the most that it ever took."""
    pages = _read("/proc/self/statm").split()
    if pages:
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def byte_count(size: int | str) -> int:
    """Bytes of "6GB", "500 MiB" or a number; FewbitError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if found is None or found[2].upper() not in UNITS:
        raise FewbitError(f"found {size!r}, needs a number of bytes, or a number with KB, MB, GB, KiB, MiB or GiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _accelerator() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple MPS" if torch.backends.mps.is_available() else "none"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
