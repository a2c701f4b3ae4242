"""A plan: what happens to every layer of one model, and why some stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.errors import PlanError
from fewbit.nn import input_placeholder
from fewbit.plan.recipe import Recipe, check_names
from fewbit.qtensor import empty
from fewbit.spec import Scheme, check_types, checked_keys

VERSION = 1
TENSOR_HEADER = 64  # bytes of a safetensors header for one tensor, beside its name


def header_bytes(name: str) -> int:
    """Bytes that a tensor of this layer takes in the file's header."""
    return len(name) + len(".weight_packed") + TENSOR_HEADER


@dataclass(frozen=True)
class Site:
    """One layer to be quantized: the float class, each weight's matrix shape, and its scheme."""

    type: str
    weights: Mapping[str, tuple[int, ...]]
    scheme: Scheme

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights with their scales, and of the input's static grid."""
        grid = input_placeholder(self.scheme.input)
        static = 0 if grid is None else sum(part.nbytes for part in grid if part is not None)
        return static + sum(empty(shape, self.scheme.weight).nbytes for shape in self.weights.values())

    def to_json(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.weights.items()}
        return {"type": self.type, "weights": shapes, "scheme": self.scheme.to_json()}

    @staticmethod
    def from_json(data: Any, where: str) -> Site:
        checked_keys(data, Site, where, required=("type", "weights", "scheme"))
        check_types(data, {"type": str, "weights": dict}, where)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in data["weights"].items():
            good = isinstance(shape, list) and len(shape) == 2
            if not good or not all(isinstance(size, int) and size >= 0 for size in shape):
                raise PlanError(f"{where}.weights.{name}: found {shape!r}, needs [rows, columns].")
            shapes[name] = (shape[0], shape[1])
        scheme = Scheme.from_json(data["scheme"], f"{where}.scheme")
        check_names(scheme, f"{where}.scheme")
        return Site(data["type"], shapes, scheme)


@dataclass(frozen=True)
class Plan:
    """The decision for one model.

    ``sites`` and ``skipped`` (with the reason) name every layer that owns a weight matrix; ``transforms`` say where each
    one applies; ``ties`` are groups of weights ("module.parameter") that are one tensor; ``float_weights`` and
    ``float_bytes`` count what stays float. ``results`` are the grids (scale, zero point) of values that are no layer's
    input, by their names in the exported graph (see ``fewbit.graph``).
    """

    recipe: Recipe
    sites: Mapping[str, Site]
    skipped: Mapping[str, str]
    transforms: Mapping[str, list[Any]] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    float_weights: int = 0
    float_bytes: int = 0
    results: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Predicted bytes of the saved model's tensors and their names. Tied weights count once."""
        sites = ((name, site) for name, site in self.sites.items() if not self._is_copy(name))
        return self.float_bytes + sum(site.nbytes + len(site.weights) * 2 * header_bytes(name) for name, site in sites)

    @property
    def share(self) -> float:
        """The share of all weights that is quantized."""
        count = sum(site.count for name, site in self.sites.items() if not self._is_copy(name))
        return count / max(1, count + self.float_weights)

    def summary(self) -> str:
        """Two or more lines: how much is quantized, and what is skipped for which reason."""
        # Transforms, values, and one of several weights of a site are skipped too but are no layers.
        others = ("transform ", "values ")
        layers = [n for n in self.skipped if not n.startswith(others) and n.rpartition(".")[0] not in self.sites]
        total = len(self.sites) + len(layers)
        lines = [f"quantized {len(self.sites)} of {total} layers, {100 * self.share:.1f} % of the weights"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"skipped {shown}: {reason}")
        return "\n".join(lines)

    def _is_copy(self, name: str) -> bool:
        return any(name == member.rpartition(".")[0] for tie in self.ties for member in tie[1:])

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "recipe": self.recipe.to_json(),
            "transforms": dict(self.transforms),
            "sites": {name: site.to_json() for name, site in self.sites.items()},
            "skipped": dict(self.skipped),
            "ties": [list(tie) for tie in self.ties],
            "float_weights": self.float_weights,
            "float_bytes": self.float_bytes,
            "results": {name: list(grid) for name, grid in self.results.items()},
        }

    @staticmethod
    def from_json(data: Any, where: str = "plan") -> Plan:
        """PlanError, with the path in the JSON, if ``data`` is not what ``to_json`` writes."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"{where}.version: found {found!r}, this fewbit reads version {VERSION}.")
        data = {key: value for key, value in data.items() if key != "version"}
        names = ("recipe", "sites", "skipped", "transforms", "ties", "float_weights", "float_bytes", "results")
        checked_keys(data, Plan, where, required=names)
        types = {"sites": dict, "skipped": dict, "transforms": dict, "ties": list, "float_weights": int}
        check_types(data, {**types, "float_bytes": int, "results": dict}, where)
        for name, grid in data["results"].items():
            good = isinstance(grid, list) and [type(part) for part in grid] == [float, int]
            if not good or not 0 < grid[0] < math.inf or not 0 <= grid[1] <= 255:
                raise PlanError(f"{where}.results.{name}: found {grid!r}, needs [scale, zero point].")
        for number, tie in enumerate(data["ties"]):
            if not isinstance(tie, list) or not all(isinstance(name, str) for name in tie):
                raise PlanError(f"{where}.ties[{number}]: found {tie!r}, needs a list of names.")
        return Plan(
            recipe=Recipe.from_json(data["recipe"], f"{where}.recipe"),
            sites={name: Site.from_json(site, f"{where}.sites.{name}") for name, site in data["sites"].items()},
            skipped=data["skipped"],
            transforms=data["transforms"],
            ties=tuple(tuple(tie) for tie in data["ties"]),
            float_weights=data["float_weights"],
            float_bytes=data["float_bytes"],
            results={name: (grid[0], grid[1]) for name, grid in data["results"].items()},
        )
