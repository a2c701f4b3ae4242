"""Candidates, the budget, the answer."""

from __future__ import annotations

from fewbit.search.answer import Answer, Trial
from fewbit.search.autoquantize import autoquantize

__all__ = ["Answer", "Trial", "autoquantize"]
