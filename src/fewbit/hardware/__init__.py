"""The machine at hand."""

from __future__ import annotations

from fewbit.hardware.machine import Machine, byte_count, probe, resident

__all__ = ["Machine", "byte_count", "probe", "resident"]
