"""Places where a model is kept or runs: one file each, one line an engine in TARGETS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewbit.targets.compressed_tensors import export_compressed_tensors
from fewbit.targets.gguf import export_gguf
from fewbit.targets.native import load, read_checkpoint, save, saved_bytes, tensor_bytes
from fewbit.targets.onnxruntime import OnnxRuntime
from fewbit.targets.openvino import OpenVino
from fewbit.targets.pytorch import PyTorch
from fewbit.targets.target import Lowered, Operator, Target

FOLDER_FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "compressed-tensors": export_compressed_tensors,
    "gguf": export_gguf,
}

TARGETS: dict[str, Target] = {target.name: target for target in (PyTorch(), OnnxRuntime(), OpenVino())}

__all__ = [
    "FOLDER_FORMATS",
    "TARGETS",
    "Lowered",
    "Operator",
    "Target",
    "load",
    "read_checkpoint",
    "save",
    "saved_bytes",
    "tensor_bytes",
]
