"""Calibration of a model that is not in memory: its blocks get their float weights where they are run, and give them back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fewbit.batches import Call
from fewbit.calibration import Statistics, calibrate, observers_of
from fewbit.nn import layer_class
from fewbit.observers import SecondMoment
from fewbit.pipeline import beside, twin_of
from fewbit.plan import Plan
from fewbit.qtensor import QTensor
from fewbit.sequential import Weights, find_blocks, find_walk, quantize_blocks, quantize_outside
from fewbit.source import Source

Quantize = Callable[[str, str, Tensor | None], QTensor]  # the weight of a site and parameter, for an importance
Written = Callable[[str, str], QTensor | None]  # the quantized weight of a site and parameter, if it is in a file


class Placed:
    """``model`` is the float model of a source: what is outside of blocks is mapped from the files, a block while it runs."""

    def __init__(self, source: Source, blocks: Sequence[str]) -> None:
        self.model = twin_of(source.model)
        self._source = source
        self._held: set[str] = set()
        names: dict[int, str] = {}
        for name, parameter in source.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), name)
        self._owners: dict[str, list[tuple[nn.Module, str, nn.Parameter, str]]] = {name: [] for name in ("", *blocks)}
        for path, module in self.model.named_modules():
            block = next((name for name in blocks if f"{path}.".startswith(f"{name}.")), "")
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[block].append((module, key, parameter, names[id(parameter)]))
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = source.weights[f"{path}.{key}" if path else key].make()
        self._place("")
        for name in blocks:
            block_module = self.model.get_submodule(name)
            block_module.register_forward_pre_hook(lambda *_, name=name: self._before(name))
            block_module.register_forward_hook(lambda *_, name=name: self._after(name), always_call=True)

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[None]:
        """The block has its weights, also between calls."""
        self._held.add(name)
        self._place(name)
        try:
            yield
        finally:
            self._held.discard(name)
            self._remove(name)

    def _before(self, name: str) -> None:
        if name not in self._held:
            self._place(name)

    def _after(self, name: str) -> None:
        if name not in self._held:
            self._remove(name)

    def _place(self, block: str) -> None:
        made: dict[str, nn.Parameter] = {}  # what is tied stays tied
        for module, key, _, name in self._owners[block]:
            if name not in made:
                made[name] = nn.Parameter(self._source.weights[name].make(), requires_grad=False)
            module._parameters[key] = made[name]

    def _remove(self, block: str) -> None:
        for module, key, parameter, _ in self._owners[block]:
            module._parameters[key] = parameter


class Informed:
    """The weights of a source as data want them, in the order of its blocks; what ``quantize`` finds for the model in memory.

    ``quantize`` makes a weight that no walk finds, ``written`` reads one that is in a file of the result already.
    """

    def __init__(self, source: Source, plan: Plan, calls: Sequence[Call], quantize: Quantize, written: Written) -> None:
        self._plan, self._quantize, self._written = plan, quantize, written
        self._float = source.model
        placed = Placed(source, find_blocks(source.model))
        model = placed.model
        self._walk = find_walk(model, plan.sites)
        observed = beside(plan, self._walk)
        self._beside = list(observed.sites)
        self._statistics: Statistics = {}
        if any(observers_of(site, model.get_submodule(name)) for name, site in observed.sites.items()):
            self._statistics = calibrate(model, observed, calls)
        self._kept: dict[int, QTensor] = {}  # by the float parameter: tied weights are one
        if self._walk.outside:
            self._keep(quantize_outside(model, self._walk, calls))
        self._found: Iterator[Weights] = iter(())
        if self._walk.blocks:
            # Now, since they are needed when the first block is asked for: some of them may have been taken by then.
            self._outside: Weights = self._others("")
            self._found = quantize_blocks(model, self._walk, calls, self._of_block, self._known, placed.block)

    @property
    def in_order(self) -> bool:
        """Whether blocks must be asked for in their order, by all processes that share the work."""
        return bool(self._walk.blocks)

    def importance(self, name: str, key: str) -> Tensor | None:
        """That of the columns of this weight, from any layer that has it."""
        for other in self._sharing(name, key):
            state: Any = self._statistics.get(other, {}).get("second_moment")
            if state is not None and int(state["count"]):
                module = self._float.get_submodule(other)
                return layer_class(module).importance(module, SecondMoment().mean(state))
        return None

    def take(self, name: str, key: str) -> QTensor | None:
        """The weight if it has been found; it is kept no longer."""
        block = next((block for block in self._walk.blocks if name.startswith(f"{block}.")), None)
        if block is not None and name.removeprefix(f"{block}.") in self._walk.blocks[block]:
            while self._parameter(name, key) not in self._kept:
                self._keep(next(self._found))
        return self._kept.pop(self._parameter(name, key), None)

    def _parameter(self, name: str, key: str) -> int:
        return id(self._float.get_submodule(name)._parameters[key])

    def _sharing(self, name: str, key: str) -> Iterator[str]:
        own = self._parameter(name, key)
        for other, site in self._plan.sites.items():
            if any(self._parameter(other, k) == own for k in site.weights):
                yield other

    def _keep(self, weights: Weights) -> None:
        for name, own in weights.items():
            for key, weight in own.items():
                self._kept[self._parameter(name, key)] = weight

    def _of_block(self, block: str) -> Weights:
        if block:
            return self._others(block)
        outside, self._outside = self._outside, {}
        return outside

    def _others(self, block: str) -> Weights:
        """The weights beside the walk in a block, or outside of all; kept until they are taken."""
        names = self._walk.of({name: {} for name in (*self._beside, *self._walk.outside)}, block)
        weights: Weights = {}
        for name in names:
            weights[name] = {}
            for key in self._plan.sites[name].weights:
                parameter = self._parameter(name, key)
                if parameter not in self._kept:
                    written = self._written(name, key)
                    made = self._quantize(name, key, self.importance(name, key)) if written is None else written
                    self._kept[parameter] = made
                weights[name][key] = self._kept[parameter]
        return weights

    def _known(self, block: str) -> Weights:
        """The weights of a block if all of them are in files."""
        found = {
            f"{block}.{name}": {key: self._written(f"{block}.{name}", key) for key in site.weights}
            for name, site in self._walk.blocks[block].items()
        }
        weights = {name: {k: w for k, w in own.items() if w is not None} for name, own in found.items()}
        return weights if all(len(weights[name]) == len(found[name]) for name in found) else {}
