"""Places where a model is kept or runs: one file each, one line an engine in TARGETS."""

from __future__ import annotations

from fewbit.targets.native import load, read_checkpoint, save, saved_bytes, tensor_bytes
from fewbit.targets.onnxruntime import OnnxRuntime
from fewbit.targets.openvino import OpenVino
from fewbit.targets.pytorch import PyTorch
from fewbit.targets.target import Lowered, Operator, Target

TARGETS: dict[str, Target] = {target.name: target for target in (PyTorch(), OnnxRuntime(), OpenVino())}

__all__ = ["TARGETS", "Lowered", "Operator", "Target", "load", "read_checkpoint", "save", "saved_bytes", "tensor_bytes"]
