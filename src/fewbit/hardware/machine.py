"""What this machine is: instruction sets, cores, memory, versions, installed extras."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

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
