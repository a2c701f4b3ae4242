"""A recipe: which layers are to be quantized how, independent of any model."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fewbit.errors import PlanError, unknown
from fewbit.methods import METHODS
from fewbit.observers import OBSERVERS
from fewbit.spec import QuantSpec, Scheme, check_types, checked_keys
from fewbit.transforms import TRANSFORMS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CORRECTIONS = ("affine", "bias")


@dataclass(frozen=True)
class Rule:
    """The layers that ``pattern`` matches get ``scheme``; None leaves them in float.

    A pattern is ``type:NAME`` for layer classes (``type:Linear``, ``type:LSTM|GRU``), ``re:REGEX`` for a whole module
    name, or a glob on module names (``encoder.layer.*.output.dense``). A layer with fewer weights than ``min_weights``
    or fewer output channels than ``min_channels`` stays float: it is too small or too narrow to gain. A rule that
    matches nothing is an error unless it is ``optional``.
    """

    pattern: str
    scheme: Scheme | None
    min_weights: int = 0
    optional: bool = False
    min_channels: int = 0

    def matches(self, name: str, kind: str) -> bool:
        if self.pattern.startswith("type:"):
            return kind in self.pattern[5:].split("|")
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)

    def to_json(self) -> dict[str, Any]:
        scheme = None if self.scheme is None else self.scheme.to_json()
        limits = {"min_weights": self.min_weights, "min_channels": self.min_channels}
        return {"pattern": self.pattern, "scheme": scheme, **limits, "optional": self.optional}

    @staticmethod
    def from_json(data: Any, where: str) -> Rule:
        values = dict(checked_keys(data, Rule, where, required=("pattern",)))
        types = {"pattern": str, "min_weights": int, "min_channels": int, "optional": bool}
        check_types(values, types, where)
        scheme = values.get("scheme")
        values["scheme"] = None if scheme is None else Scheme.from_json(scheme, f"{where}.scheme")
        return Rule(**values)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, of which the first match wins, and the transforms to run on the float model before.

    ``results`` says how values between convolutions that are no layer's input are quantized, such as the terms of residual
    additions, where an engine computes on them; None: there they stay float. ``correction`` ("affine", "bias" or None) is
    what layers with static inputs get after quantization, see ``fewbit.correction``. ``sensitive``: a small first or last
    layer that makes more than this share of the output's squared error stays float, see ``fewbit.sensitivity``. ``ends``: the
    scheme of the first and the last layer with a static input, in the order of execution, whatever their rule says.
    """

    name: str
    rules: tuple[Rule, ...]
    transforms: tuple[str, ...] = ()
    results: QuantSpec | None = None
    correction: str | None = None
    sensitive: float | None = None
    ends: Scheme | None = None

    def __post_init__(self) -> None:
        for transform in self.transforms:
            if transform not in TRANSFORMS:
                raise PlanError(f"recipe {self.name!r}: {unknown('transform', transform, TRANSFORMS)}")
        if self.correction is not None and self.correction not in CORRECTIONS:
            raise PlanError(f"recipe {self.name!r}: {unknown('correction', self.correction, CORRECTIONS)}")
        if self.sensitive is not None and not 0 < self.sensitive < 1:
            raise PlanError(
                f"recipe {self.name!r}: sensitive must be a share between 0 and 1, found {self.sensitive:g}."
            )
        if self.results is not None:
            _check_results(self.results, f"recipe {self.name!r}: results")
        if self.ends is not None:
            check_names(self.ends, f"recipe {self.name!r}: ends")
            if self.ends.input is None or not self.ends.input.is_static:
                raise PlanError(
                    f"recipe {self.name!r}: ends needs an input with an observer: it replaces a static scheme."
                )
        for number, rule in enumerate(self.rules):
            where = f"recipe {self.name!r}: rules[{number}]"
            if rule.pattern.startswith("re:"):
                try:
                    re.compile(rule.pattern[3:])
                except re.error as error:
                    raise PlanError(f"{where}: {rule.pattern!r} is not a regular expression: {error}.") from None
            if rule.scheme is not None:
                check_names(rule.scheme, where)

    @property
    def needs_calibration(self) -> bool:
        """Whether some rule fixes input ranges by calibration."""
        schemes = [rule.scheme for rule in self.rules if rule.scheme is not None]
        return any(scheme.input is not None and scheme.input.is_static for scheme in schemes)

    def override(self, pattern: str, scheme: Scheme | None) -> Recipe:
        """The recipe with one more rule before all others. ``scheme`` None leaves the matching layers in float."""
        return replace(self, rules=(Rule(pattern, scheme), *self.rules))

    def to_json(self) -> dict[str, Any]:
        rules = [rule.to_json() for rule in self.rules]
        data: dict[str, Any] = {"name": self.name, "rules": rules, "transforms": list(self.transforms)}
        if self.results is not None:
            data["results"] = self.results.to_json()
        if self.correction is not None:
            data["correction"] = self.correction
        if self.sensitive is not None:
            data["sensitive"] = self.sensitive
        if self.ends is not None:
            data["ends"] = self.ends.to_json()
        return data

    @staticmethod
    def from_json(data: Any, where: str) -> Recipe:
        checked_keys(data, Recipe, where, required=("name", "rules"))
        check_types(
            data, {"name": str, "rules": list, "transforms": list, "correction": str, "sensitive": float}, where
        )
        for number, transform in enumerate(data.get("transforms", ())):
            check_types({f"transforms[{number}]": transform}, {f"transforms[{number}]": str}, where)
        rules = (Rule.from_json(rule, f"{where}.rules[{number}]") for number, rule in enumerate(data["rules"]))
        results = QuantSpec.from_json(data["results"], f"{where}.results") if "results" in data else None
        transforms = tuple(data.get("transforms", ()))
        ends = Scheme.from_json(data["ends"], f"{where}.ends") if "ends" in data else None
        shares = data.get("correction"), data.get("sensitive")
        return Recipe(data["name"], tuple(rules), transforms, results, *shares, ends)


def _check_results(spec: QuantSpec, where: str) -> None:
    if spec.format != "uint8" or spec.observer is None:
        raise PlanError(
            f"{where}: found {spec.format!r}, observer {spec.observer!r}; engines need 'uint8' and an observer."
        )
    if spec.observer not in OBSERVERS:
        raise PlanError(f"{where}: {unknown('observer', spec.observer, OBSERVERS)}")


def check_names(scheme: Scheme, where: str) -> None:
    """PlanError if the scheme names a method or an observer that does not exist."""
    if scheme.method not in METHODS:
        raise PlanError(f"{where}: {unknown('method', scheme.method, METHODS)}")
    if scheme.input is not None and scheme.input.observer is not None and scheme.input.observer not in OBSERVERS:
        raise PlanError(f"{where}: {unknown('observer', scheme.input.observer, OBSERVERS)}")


def presets() -> list[str]:
    """The names of the recipes that come with fewbit."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load_recipe(recipe: str | Path | Recipe, exclude: Iterable[str] = ()) -> Recipe:
    """A recipe from a preset's name or a TOML file, with the patterns in ``exclude`` left in float.

    PlanError if there is no such preset or file, or the file is not a recipe.
    """
    if not isinstance(recipe, Recipe):
        recipe = _read(recipe)
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        recipe = recipe.override(pattern, None)
    return recipe


def _read(source: str | Path) -> Recipe:
    name = str(source)
    if name in presets():
        text = (_folder() / f"{name}.toml").read_text()
    elif name.endswith(".toml"):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"recipe {name}: cannot be read: {error}.") from None
    else:
        raise PlanError(f"{unknown('recipe', name, presets())} Or give the path of a .toml file.")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"recipe {name}: not valid TOML: {error}.") from None
    return Recipe.from_json(data, name)


def _folder() -> Any:
    return resources.files("fewbit.plan") / "presets"
