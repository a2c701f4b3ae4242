"""The errors of fewbit. Each message says where, what was found, what is allowed and what to do.

FewbitError
+-- PlanError          a recipe or plan that is wrong or does not fit the model
+-- CalibrationError   calibration data that is missing, malformed or not finite
+-- UnsupportedError   something that fewbit does not do, or an extra that is not installed
+-- CheckpointError    a saved model that is damaged, foreign or does not fit
+-- EvaluationError    an evaluate function that does not return usable scores, or a budget that is none
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewbitError(Exception):
    """Any error that fewbit raises on purpose."""


class PlanError(FewbitError):
    """A recipe or plan is wrong, or does not fit the model."""


class CalibrationError(FewbitError):
    """Calibration data is missing, malformed or not finite."""


class UnsupportedError(FewbitError):
    """fewbit does not do this, or an optional extra is not installed."""


class CheckpointError(FewbitError):
    """A saved model is damaged, foreign or does not fit the float model."""


class EvaluationError(FewbitError):
    """An evaluate function did not return usable scores, or a budget is none."""


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """The text for a name that is not in a table, with the nearest name that is."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Allowed: {', '.join(names)}."
