"""Looking a format up by its name."""

from __future__ import annotations

import pytest

from fewbit.errors import PlanError
from fewbit.formats import FORMATS, get_format


def test_get_format_returns_the_entry_of_the_table() -> None:
    assert get_format("int4") is FORMATS["int4"]


def test_unknown_format_names_the_nearest_and_all_that_are_allowed() -> None:
    with pytest.raises(PlanError) as raised:
        get_format("int9")
    message = str(raised.value)
    assert "unknown format 'int9'. Did you mean 'int" in message
    assert all(name in message for name in FORMATS)


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(PlanError) as raised:
        get_format("zzz")
    assert "Did you mean" not in str(raised.value)
