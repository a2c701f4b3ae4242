"""The machine at hand."""

from __future__ import annotations

from fewbit.hardware.machine import Machine, probe

__all__ = ["Machine", "probe"]
