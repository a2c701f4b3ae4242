"""Places where a model is kept or runs: one file each."""

from __future__ import annotations

from fewbit.targets.native import load, save, saved_bytes, tensor_bytes

__all__ = ["load", "save", "saved_bytes", "tensor_bytes"]
