"""How one number is coded: one file a family, one line an entry in FORMATS."""

from __future__ import annotations

from fewbit.errors import PlanError, unknown
from fewbit.formats.codebook import NF4_VALUES, Codebook
from fewbit.formats.format import Format
from fewbit.formats.integer import Integer

FORMATS: dict[str, Format] = {
    "int8": Integer("int8", 8, signed=True, narrow=True),
    "uint8": Integer("uint8", 8, signed=False),
    "int6": Integer("int6", 6, signed=True),
    "int4": Integer("int4", 4, signed=True),
    "uint4": Integer("uint4", 4, signed=False),
    "nf4": Codebook("nf4", 4, NF4_VALUES),
}


__all__ = ["FORMATS", "Codebook", "Format", "Integer", "get_format"]


def get_format(name: str) -> Format:
    """The format of this name; PlanError for a name that is not in FORMATS."""
    if name not in FORMATS:
        raise PlanError(unknown("format", name, FORMATS))
    return FORMATS[name]
