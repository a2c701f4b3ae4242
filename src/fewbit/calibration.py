"""What a plan needs to know of the data, from one pass over them. Memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from fewbit.batches import Call, run
from fewbit.errors import CalibrationError
from fewbit.graph import Graph, Watched, leaves
from fewbit.methods import METHODS
from fewbit.nn import layer_class
from fewbit.observers import OBSERVERS, Observer, SecondMoment, State
from fewbit.plan import Plan, Site
from fewbit.processes import gathered
from fewbit.progress import progress
from fewbit.qtensor import qparams
from fewbit.spec import QuantSpec

Statistics = dict[str, dict[str, State]]  # by site or value, then "input", "second_moment" or "result"
Grid = tuple[Tensor, Tensor | None]  # scale and zero point, [1]


def calibrate(model: nn.Module, plan: Plan, batches: Iterable[Call], graph: Graph | None = None) -> Statistics:
    """What the plan's sites need to know of their inputs, and with a graph what its other values need.

    ``model`` is the float twin of the plan, ``graph`` its graph; batches of other shapes than the graph's are seen by the
    sites alone. Processes that share the work get the statistics of all their batches. CalibrationError if the model fails on a
    batch or a value is not finite.
    """
    watching = _Watching(model, plan, graph)
    for number, call in enumerate(progress(batches, "calibrating")):
        watching.batch = number
        if graph is not None and graph.fits(call.args, call.kwargs):
            run(watching.program, call, f"calibration batch {number}")
            names = watching.outside
        else:
            names = watching.names
        if names:
            with watching.sites(names):
                run(model, call, f"calibration batch {number}")
    return watching.merged(gathered(watching.statistics))


def observers_of(site: Site, module: nn.Module) -> dict[str, Observer]:
    """What is kept of a site's input: nothing if its scheme needs no data."""
    observers: dict[str, Observer] = {}
    if site.scheme.input is not None and site.scheme.input.observer is not None:
        observers["input"] = OBSERVERS[site.scheme.input.observer]
    if METHODS[site.scheme.method].uses_importance and layer_class(module).channel_axis(module) is not None:
        observers["second_moment"] = SecondMoment()
    return observers


def grid_of(state: State, spec: QuantSpec, what: str) -> Grid:
    """The static grid of ``spec`` for what was observed; CalibrationError naming ``what`` if there is none."""
    assert spec.observer is not None
    low, high = OBSERVERS[spec.observer].choose_range(state, spec)
    try:
        scale, zero_point = qparams(low.reshape(1), high.reshape(1), spec)
    except ValueError as error:
        raise CalibrationError(f"{what}: {error}") from None
    assert isinstance(scale, Tensor)
    return scale, zero_point


class _Watching:
    """Observers on the inputs of sites, called from module hooks or from the graph's interpreter."""

    def __init__(self, model: nn.Module, plan: Plan, graph: Graph | None) -> None:
        self.model = model
        self.statistics: Statistics = {}
        self.batch = 0
        self._observers: dict[str, dict[str, Observer]] = {}
        for name, site in plan.sites.items():
            if observers := observers_of(site, model.get_submodule(name)):
                self._observers[name] = observers
        self.names = list(self._observers)
        if graph is None:
            return
        self._readers = graph.inputs()
        self.outside = [name for name in self.names if name not in graph.layers.values()]
        self._results: dict[Node, str] = {}
        if plan.recipe.results is not None and plan.recipe.results.observer is not None:
            self._results = graph.results()
            self._observer = OBSERVERS[plan.recipe.results.observer]
        self.program = _Program(Watched(graph.module, self._see))

    @contextmanager
    def sites(self, names: Iterable[str]) -> Iterator[None]:
        """Hooks on the model's own modules of these names."""

        def hook(name: str) -> Any:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._input(name, args[0] if args else kwargs.get("input", next(iter(kwargs.values()))))

            return see

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def merged(self, parts: list[Statistics]) -> Statistics:
        """The statistics of several streams, one after the other."""
        first, *others = parts
        for other in others:
            for name, states in other.items():
                known = first.setdefault(name, {})
                for key, state in states.items():
                    observer = self._observer if key == "result" else self._observers[name][key]
                    known[key] = observer.merge(known[key], state) if key in known else state
        return first

    def _see(self, node: Node, value: Tensor) -> None:
        for name in self._readers.get(node, ()):
            self._input(name, value)
        name = self._results.get(node, "")
        if name and value.numel():
            self._check(value, f"the value {name!r}")
            state = self.statistics.get(name, {}).get("result") or self._observer.init()
            self.statistics[name] = {"result": self._observer.update(state, value)}

    def _input(self, name: str, x: Tensor) -> None:
        module = self.model.get_submodule(name)
        states = self.statistics.setdefault(name, {})
        if x.numel():
            self._check(x, f"the input of {name!r}")
        for key, observer in self._observers.get(name, {}).items():
            axis = None if key == "input" else layer_class(module).channel_axis(module)
            state = states.get(key) or observer.init()
            states[key] = observer.update(state, x if axis is None else x.movedim(axis, 0)) if x.numel() else state

    def _check(self, x: Tensor, what: str) -> None:
        if not all(bool(end.isfinite()) for end in x.aminmax()):
            raise CalibrationError(f"calibration batch {self.batch}: {what} has a NaN or an infinity.")


class _Program(nn.Module):
    """A watched graph with the model's own signature."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched = watched

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self._watched.run(*leaves((args, kwargs)), enable_io_processing=False)
