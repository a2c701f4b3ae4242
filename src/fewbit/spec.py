"""What is wanted of one tensor (QuantSpec) and of one site (Scheme): pure data with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fewbit.errors import PlanError, unknown
from fewbit.formats import Format, get_format

# float16 is left out: its smallest numbers are within the range of real weights' scales.
SCALE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale.

    ``tensor``: all. ``channel``: those with the same index along ``axis`` (the axis kept). ``token``: those of one
    vector along the last axis. ``group``: ``group_size`` neighbours along the last axis; the last group may be shorter.
    """

    kind: Literal["tensor", "channel", "token", "group"]
    axis: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        kinds = ("tensor", "channel", "token", "group")
        if self.kind not in kinds:
            raise PlanError(unknown("granularity", self.kind, kinds))
        if self.kind == "group" and self.group_size < 1:
            raise PlanError(f"group granularity needs group_size >= 1, found {self.group_size}.")

    def to_json(self) -> str | dict[str, int]:
        if self.kind == "group":
            return {"group": self.group_size}
        return {"channel": self.axis} if self.kind == "channel" else self.kind

    @staticmethod
    def from_json(data: Any, where: str) -> Granularity:
        if data in ("tensor", "token"):
            return Granularity(data)
        if isinstance(data, dict) and len(data) == 1:
            [(kind, number)] = data.items()
            if kind in ("group", "channel") and type(number) is int:
                return _located(where, Granularity, {"kind": kind, "group_size" if kind == "group" else "axis": number})
        raise PlanError(f"{where}: found {data!r}; allowed: 'tensor', 'token', {{'channel': axis}}, {{'group': size}}.")


PER_TENSOR = Granularity("tensor")
PER_TOKEN = Granularity("token")


def per_channel(axis: int = 0) -> Granularity:
    """One scale for each index along ``axis``."""
    return Granularity("channel", axis=axis)


def per_group(group_size: int) -> Granularity:
    """One scale for each ``group_size`` neighbours along the last axis."""
    return Granularity("group", group_size=group_size)


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    ``observer`` names what chooses a static range in calibration; None takes the range of the tensor at hand (weights,
    and dynamic activations). ``scale_dtype`` holds the scales. ``scale`` quantizes them (two-level scales): what its codes
    stand for is then rounded to ``scale_dtype``, so that kernels can hold it.
    """

    format: str
    granularity: Granularity = PER_TENSOR
    symmetric: bool = True
    observer: str | None = None
    scale: QuantSpec | None = None
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        number = get_format(self.format)
        low, _ = number.bound(symmetric=True)
        if self.symmetric and low >= 0:
            raise PlanError(f"format {self.format!r} has no negative values: it needs symmetric = false.")
        if not self.symmetric and not number.is_integer:
            raise PlanError(f"format {self.format!r} is not an integer format: it needs symmetric = true.")
        if self.observer is not None and self.granularity.kind != "tensor":
            raise PlanError(
                f"observer {self.observer!r} needs granularity 'tensor', found {self.granularity.kind!r}: "
                "static ranges are kept per tensor."
            )
        if self.scale is not None and self.scale.is_static:
            raise PlanError("a scale's range is that of the scales at hand: its spec must have observer = None.")
        if self.scale_dtype not in SCALE_DTYPES:
            raise PlanError(unknown("scale_dtype", self.scale_dtype, SCALE_DTYPES))

    @property
    def number(self) -> Format:
        """The Format that ``format`` names."""
        return get_format(self.format)

    @property
    def is_static(self) -> bool:
        """Whether the range comes from calibration."""
        return self.observer is not None

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["granularity"] = self.granularity.to_json()
        data["scale"] = None if self.scale is None else self.scale.to_json()
        return data

    @staticmethod
    def from_json(data: Any, where: str) -> QuantSpec:
        data = checked_keys(data, QuantSpec, where, required=("format",))
        values = dict(data)
        if "granularity" in data:
            values["granularity"] = Granularity.from_json(data["granularity"], f"{where}.granularity")
        if data.get("scale") is not None:
            values["scale"] = QuantSpec.from_json(data["scale"], f"{where}.scale")
        check_types(values, {"format": str, "symmetric": bool, "scale_dtype": str}, where)
        if values.get("observer") is not None:
            check_types(values, {"observer": str}, where)
        return _located(where, QuantSpec, values)


@dataclass(frozen=True)
class Scheme:
    """What happens at one site: its weights, its input (None: stays float) and the method that chooses the weight codes."""

    weight: QuantSpec
    input: QuantSpec | None = None
    method: str = "rtn"

    def __post_init__(self) -> None:
        if self.weight.is_static:
            raise PlanError("a weight's range is that of the weight: its spec must have observer = None.")

    def to_json(self) -> dict[str, Any]:
        input_spec = None if self.input is None else self.input.to_json()
        return {"weight": self.weight.to_json(), "input": input_spec, "method": self.method}

    @staticmethod
    def from_json(data: Any, where: str) -> Scheme:
        data = checked_keys(data, Scheme, where, required=("weight",))
        values = {"weight": QuantSpec.from_json(data["weight"], f"{where}.weight"), "method": data.get("method", "rtn")}
        if data.get("input") is not None:
            values["input"] = QuantSpec.from_json(data["input"], f"{where}.input")
        check_types(values, {"method": str}, where)
        return _located(where, Scheme, values)


def checked_keys(data: Any, cls: type, where: str, required: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """``data`` if it is a mapping whose keys are fields of the dataclass ``cls``; PlanError otherwise."""
    if not isinstance(data, dict):
        raise PlanError(f"{where}: found {type(data).__name__}, needs a table of {cls.__name__} fields.")
    allowed = [field.name for field in fields(cls)]
    for key in data:
        if key not in allowed:
            raise PlanError(f"{where}: {unknown('key', key, allowed)}")
    for key in required:
        if key not in data:
            raise PlanError(f"{where}: key {key!r} is missing.")
    return data


def check_types(values: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    """PlanError if a value that is present has another type than the one named."""
    for key, expected in types.items():
        if key in values and not isinstance(values[key], expected):
            raise PlanError(f"{where}.{key}: found {values[key]!r}, needs a {expected.__name__}.")


def _located(where: str, cls: Any, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
