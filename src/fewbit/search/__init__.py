"""Candidates, the budget, the answer; formats within a size."""

from __future__ import annotations

from fewbit.search.answer import Answer, Trial
from fewbit.search.autoquantize import autoquantize
from fewbit.search.mixed_precision import mixed_precision

__all__ = ["Answer", "Trial", "autoquantize", "mixed_precision"]
