"""LSTM and GRU: all layers, both directions, projections, batched or not, packed sequences.

The input products of all time steps are one matrix product; the rest is ``fewbit.ops.recurrent``. Quantized inputs are
int8 for each row of x_t and h_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops.linear import DTYPES, call, numbers_of
from fewbit.ops.recurrent import States, call_recurrent, is_operator_call, product, recurrent
from fewbit.qtensor import QTensor

# One layer in one direction, see Recurrent._scan.
Scan = Callable[[Tensor, list[int], States, str], tuple[Tensor, States]]


class Recurrent(QuantizedLayer):
    """What LSTM and GRU share; the arguments and results of torch's."""

    accepts_static_input = False  # h_t is not seen from outside
    cell: str

    @staticmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        return {name: weight for name, weight in module.named_parameters(recurse=False) if name.startswith("weight")}

    def _adopt(self, module: nn.Module) -> None:
        settings: Any = module
        self.input_size: int = settings.input_size
        self.hidden_size: int = settings.hidden_size
        self.proj_size: int = settings.proj_size
        self.num_layers: int = settings.num_layers
        self.bias: bool = settings.bias
        self.batch_first: bool = settings.batch_first
        self.bidirectional: bool = settings.bidirectional
        self.dropout: float = settings.dropout
        for name, parameter in module.named_parameters(recurse=False):
            if name not in self._shapes:  # biases, and weights that stay float
                self.register_parameter(name, parameter)

    def flatten_parameters(self) -> None:
        """Nothing to do: torch's layers have this method, and models call it."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        return run_layers(self, input, hx, self._scan)

    def _prepare(self) -> None:
        self._numbers = {name: numbers_of(self.qtensor(name), self.scheme.input) for name in self._shapes}

    def _scan(self, data: Tensor, sizes: list[int], states: States, suffix: str) -> tuple[Tensor, States]:
        """One layer in one direction: outputs ``[sum(sizes), size]`` and the last states of each sequence."""
        bias_ih, bias_hh = (self._parameters[f"bias_{of}{suffix}"] if self.bias else None for of in ("ih", "hh"))
        spec, reverse = self.scheme.input, suffix.endswith("_reverse")
        numbers = self._numbers.get(f"weight_ih{suffix}")
        if numbers is not None and data.dtype in DTYPES:
            gates = call(data, *self._stored(f"weight_ih{suffix}"), bias_ih, numbers)
        else:
            gates = product(data, self._weight(f"weight_ih{suffix}"), bias_ih, spec)
        numbers = self._numbers.get(f"weight_hh{suffix}")
        if numbers is not None and spec is not None and not self.proj_size and is_operator_call(gates, states, bias_hh):
            weight = (*self._stored(f"weight_hh{suffix}"), bias_hh)
            return call_recurrent(self.cell, gates, states, weight, numbers, sizes, reverse)
        projection = self._weight(f"weight_hr{suffix}") if self.proj_size else None
        weight_hh = self._weight(f"weight_hh{suffix}")
        return recurrent(self.cell, gates, states, weight_hh, bias_hh, spec, sizes, reverse, projection)

    def _stored(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        # The dict: nn.Module finds attributes slowly, and models call layers once a step.
        buffers: dict[str, Any] = self._buffers
        return buffers[f"{name}_packed"], buffers[f"{name}_scale"], buffers.get(f"{name}_zero_point")

    def _weight(self, name: str) -> QTensor | Tensor:
        return self.qtensor(name) if name in self._shapes else self.get_parameter(name)

    def extra_repr(self) -> str:
        return f"{self.input_size} -> {self.hidden_size}, layers {self.num_layers}, {super().extra_repr()}"


class LSTM(Recurrent):
    """torch.nn.LSTM."""

    cell = "lstm"


class GRU(Recurrent):
    """torch.nn.GRU."""

    cell = "gru"


def run_layers(layer: Any, input: Any, hx: Any, scan: Scan) -> tuple[Any, Any]:
    """All layers and directions of ``layer``, which has the settings of torch's; its arguments and results."""
    x = input
    if isinstance(x, PackedSequence):
        data, sizes = x.data, x.batch_sizes.tolist()
        order, back = x.sorted_indices, x.unsorted_indices
        y, states = _layers(layer, data, sizes, _initial(layer, hx, data, sizes[0], order), scan)
        result = PackedSequence(y, x.batch_sizes, order, back)
        return result, _returned(states if back is None else tuple(s.index_select(1, back) for s in states))
    if x.dim() not in (2, 3):
        raise ValueError(f"{type(layer).__name__}: found an input of {x.dim()} axes, needs 2 (unbatched) or 3.")
    batched = x.dim() == 3
    steps = (x.transpose(0, 1) if layer.batch_first else x) if batched else x.unsqueeze(1)
    length, batch, _ = steps.shape
    if hx is not None and not batched:
        hx = tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
    states = _initial(layer, hx, x, batch, None)
    y, states = _layers(layer, steps.flatten(0, 1), [batch] * length, states, scan)
    y = y.unflatten(0, (length, batch))
    if not batched:
        return y.squeeze(1), _returned(tuple(s.squeeze(1) for s in states))
    return (y.transpose(0, 1) if layer.batch_first else y), _returned(states)


def _initial(layer: Any, hx: Any, x: Tensor, batch: int, order: Tensor | None) -> States:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    shapes = [(count, batch, size) for size in _state_sizes(layer)]
    if hx is None:
        return tuple(torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in shapes)
    states = cast(States, hx if isinstance(hx, tuple) else (hx,))
    found = [tuple(state.shape) for state in states]
    if found != shapes:
        raise ValueError(f"{type(layer).__name__}: found initial states of shapes {found}, needs {shapes}.")
    return states if order is None else tuple(state.index_select(1, order) for state in states)


def _returned(states: States) -> Any:
    return states if len(states) > 1 else states[0]


def _layers(layer: Any, data: Tensor, sizes: list[int], states: States, scan: Scan) -> tuple[Tensor, States]:
    """``data`` ``[sum(sizes), features]``: the rows of step 0, then of step 1, ...; sizes never grow."""
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    last: list[States] = []
    for number in range(layer.num_layers):
        outputs = []
        for direction in directions:
            initial = tuple(state[len(last)] for state in states)
            output, final = scan(data, sizes, initial, f"_l{number}{direction}")
            outputs.append(output)
            last.append(final)
        data = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        if layer.dropout and layer.training and number + 1 < layer.num_layers:
            data = torch.nn.functional.dropout(data, layer.dropout)
    if len(last) == 1:
        return data, tuple(state.unsqueeze(0) for state in last[0])
    return data, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _state_sizes(layer: Any) -> tuple[int, ...]:
    """The sizes of the states: the output first."""
    return (layer.proj_size or layer.hidden_size, *([layer.hidden_size] if layer.cell == "lstm" else []))
