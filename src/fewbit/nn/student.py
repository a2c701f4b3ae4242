"""Fake-quantized twins of float layers, for training: float weights and learned steps, rounded in every forward.

The codes that a forward rounds to are those that ``Student.quantized`` keeps, and products of rounded inputs are those of the
quantized layer: what is trained is what will run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fewbit.nn.conv import Conv, geometry_of
from fewbit.nn.embedding import Embedding, EmbeddingBag, bags
from fewbit.nn.experts import Experts, adopt, bias_of, rows_of, run_experts
from fewbit.nn.layer import QuantizedLayer, store_grid, stored_grid
from fewbit.nn.layers import float_class, layer_class
from fewbit.nn.linear import FusedLinear, Linear
from fewbit.nn.recurrent import GRU, LSTM, run_layers
from fewbit.ops.fake_quantize import dynamic, learned
from fewbit.ops.linear import ACTIVATIONS
from fewbit.ops.pairs import bounded
from fewbit.ops.recurrent import CELLS, States, scan
from fewbit.ops.simulated import simulated_conv, simulated_linear
from fewbit.qtensor import QTensor, dequantize, dynamic_qparams, encode, pack, quantize_with, scale_values
from fewbit.spec import QuantSpec, Scheme


class LearnedGrid(nn.Module):
    """The grid of one weight matrix, or of one static input, with a step that is trained.

    Buffers ``scale`` and ``zero_point`` are those of the start, parameters what training adds: the scale in use is
    ``scale * exp(log_scale)``, of two levels rounded to the grid of the scales, which stays; the zero point is
    ``round(zero_point + shift * (number of codes - 1))``, but stays at an end of the codes, where all values have one sign, and
    in a weight.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        scale: Tensor | QTensor,
        zero_point: Tensor | None,
        pairs: tuple[Tensor, ...] = (),
    ) -> None:
        """``shape``: of the matrix; ``pairs``: of its columns, whose codes are bounded (``fewbit.ops.pairs``)."""
        super().__init__()
        self.spec, self.shape, self._pairs = spec, shape, pairs
        store_grid(self, scale, zero_point)
        self.log_scale = nn.Parameter(torch.zeros_like(scale_values(scale, spec)))
        self.shift: nn.Parameter | None = None
        if zero_point is not None and spec.is_static and self._is_inner(zero_point):
            self.shift = nn.Parameter(torch.zeros(1, device=zero_point.device))

    def _is_inner(self, zero_point: Tensor) -> bool:
        low, high = self.spec.number.bound(self.spec.symmetric)
        return low < float(zero_point) < high

    @torch.no_grad()
    def values(self) -> tuple[Tensor | QTensor, Tensor | None]:
        """Scale and zero point in use."""
        scale, zero_point = stored_grid(self, "", self.spec, self.shape)
        factor = self.log_scale.exp()
        if isinstance(scale, QTensor):
            start, step = dequantize(scale), scale_values(scale.scale, scale.spec)
            # A scale that rounded to 0 would stay there: nothing in its group had a gradient.
            grown = torch.where(start > 0, torch.maximum(start * factor, step), start)
            scale = quantize_with(grown, scale.spec, scale.scale, scale.zero_point)
        else:
            grown = scale.to(torch.float32) * factor
            scale = grown.clamp(min=torch.finfo(scale.dtype).tiny).to(scale.dtype)
        if self.shift is not None:
            low, high = self.spec.number.bound(self.spec.symmetric)
            assert zero_point is not None
            moved = (zero_point + self.shift * (high - low)).round()
            zero_point = moved.clamp(low, high).to(zero_point.dtype)
        return scale, zero_point

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """``x`` rounded; with ``rows``, x is those rows of the matrix."""
        scale, zero_point = self.values()
        values = scale_values(scale, self.spec)
        log_scale: Tensor = self.log_scale
        if rows is not None and len(values) > 1:
            values, log_scale = values[rows], log_scale[rows]
            zero_point = None if zero_point is None else zero_point[rows]
        return learned(x, self.spec, values, zero_point, log_scale, self.shift, self._pairs if rows is None else ())

    def starts_as(self, scale: Tensor, zero_point: Tensor | None) -> bool:
        """Whether the start was this one."""
        own, own_zero = stored_grid(self, "", self.spec, self.shape)
        same = isinstance(own, Tensor) and torch.equal(own, scale)
        return same and (zero_point is None or bool(own_zero == zero_point))

    @torch.no_grad()
    def quantize(self, matrix: Tensor) -> QTensor:
        """What ``forward`` rounds the matrix to."""
        scale, zero_point = self.values()
        codes = encode(matrix, self.spec, scale_values(scale, self.spec), zero_point)
        codes = bounded(codes, self._pairs) if self._pairs else codes
        return QTensor(pack(codes, self.spec.number), scale, zero_point, self.spec, self.shape)

    def extra_repr(self) -> str:
        return f"{self.spec.format} per {self.spec.granularity.kind}"


class Student(nn.Module):
    """The twin of a float layer. Its parameters have the float layer's names; for each quantized weight W there is a
    LearnedGrid ``W_grid``, for a static input ``input_grid``, which layers that read the same value share.

    Settings of the float layer (``in_features``, ``stride``, ...) are attributes here too.
    """

    input_grid: LearnedGrid | None

    def __init__(
        self,
        module: nn.Module,
        scheme: Scheme,
        weights: Mapping[str, tuple[nn.Parameter, LearnedGrid]],
        input_grid: LearnedGrid | None,
    ) -> None:
        """``weights`` by parameter name; the other parameters are the module's own."""
        super().__init__()
        padding = "_reversed_padding_repeated_twice"
        settings = {k: v for k, v in vars(module).items() if k == padding or not k.startswith("_")}
        settings.pop("training")
        vars(self).update(settings)
        self._settings = tuple(settings)
        cls = float_class(module)
        assert cls is not None
        self._float_class = cls
        self.scheme = scheme
        self.quantized_names = tuple(weights)
        for name in dict.fromkeys((*weights, *module._parameters)):
            self.register_parameter(name, weights[name][0] if name in weights else module._parameters[name])
        for name, (_, grid) in weights.items():
            self.add_module(f"{name}_grid", grid)
        self.input_grid = input_grid
        self._adopt(module)

    def _adopt(self, layer: nn.Module) -> None:
        """Keep what follows from the float layer's settings."""

    @property
    def float_layer(self) -> nn.Module:
        """A float layer with this one's settings and parameters."""
        layer = self._float_class.__new__(self._float_class)
        nn.Module.__init__(layer)
        settings = {name: vars(self)[name] for name in self._settings}
        vars(layer).update(settings, _parameters=dict(self._parameters), training=self.training)
        return layer

    def matrix(self, name: str = "weight") -> Tensor:
        """The float weight as ``[rows, columns]``, see ``QuantizedLayer.matrices``."""
        layer = self.float_layer
        return layer_class(layer).matrices(layer)[name]

    def rounded(self, name: str = "weight") -> Tensor:
        """The weight matrix as the quantized layer has it."""
        return cast(Tensor, self.get_submodule(f"{name}_grid")(self.matrix(name)))

    def rounded_input(self, x: Tensor) -> Tensor:
        """The input as the quantized layer sees it."""
        if self.input_grid is not None:
            return cast(Tensor, self.input_grid(x))
        return x if self.scheme.input is None else dynamic(x, self.scheme.input)

    def quantized(self, name: str = "weight") -> QTensor:
        """The weight matrix as the quantized layer keeps it."""
        grid = self.get_submodule(f"{name}_grid")
        assert isinstance(grid, LearnedGrid)
        return grid.quantize(self.matrix(name).detach())

    def weight_scale(self, name: str = "weight") -> Tensor:
        """The scales of a weight, float32."""
        grid = self.get_submodule(f"{name}_grid")
        assert isinstance(grid, LearnedGrid)
        scale, _ = grid.values()
        return scale_values(scale, grid.spec)

    def static_grid(self) -> tuple[Tensor, Tensor | None] | None:
        """Scale and zero point of the input if they are fixed."""
        if self.input_grid is None:
            return None
        scale, zero_point = self.input_grid.values()
        assert isinstance(scale, Tensor)
        return scale.clone(), None if zero_point is None else zero_point.clone()

    def extra_repr(self) -> str:
        return f"of {self._float_class.__name__}"


class StudentLinear(Student):
    """Linear layers, with their activation if they have one."""

    bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        activation = getattr(self, "activation", "none")
        x, weight, spec = self.rounded_input(input), self.rounded(), self.scheme.input
        if spec is None or _in_float(input):
            return ACTIVATIONS[activation][0](linear(x, weight, self.bias))
        grid = self.static_grid() or (None, None)
        return simulated_linear(input, x, weight, self.bias, self.quantized(), spec, grid, activation)


class StudentConv(Student):
    """Convolutions and transposed convolutions."""

    bias: nn.Parameter | None
    padding_mode: str

    def _adopt(self, layer: nn.Module) -> None:
        self._geometry = geometry_of(layer)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        geometry = self._geometry
        if self.padding_mode != "zeros":
            amounts: Any = self._reversed_padding_repeated_twice
            input = pad(input, list(amounts), mode=self.padding_mode)
        if output_size is not None:
            geometry = geometry.with_output_size(tuple(input.shape), output_size)
        x, weight, spec = self.rounded_input(input), geometry.weight(self.rounded()), self.scheme.input
        if spec is None or _in_float(input):
            return geometry(x, weight, self.bias)
        scale, _ = self.static_grid() or dynamic_qparams(input.detach(), spec)
        scales = scale, self.weight_scale()
        return simulated_conv(x, weight, self.bias, geometry, (spec, self.scheme.weight), scales)


class StudentEmbedding(Student):
    """Tables: only rows that are read are rounded."""

    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        return self._rows(input.reshape(-1)).reshape(*input.shape, -1)

    def _rows(self, indices: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(indices, self.get_parameter("weight"), self.padding_idx)
        return cast(Tensor, cast(Any, self.weight_grid)(rows, indices))


class StudentEmbeddingBag(StudentEmbedding):
    """Sums, means or maxima of rows."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return bags(self, input, self._rows(input.reshape(-1)), offsets, per_sample_weights)


class StudentRecurrent(Student):
    """LSTM and GRU: x_t and h_t are rounded at each step."""

    def _adopt(self, layer: nn.Module) -> None:
        self.cell = cast(Any, layer_class(layer)).cell

    def flatten_parameters(self) -> None:
        """Nothing to do: torch's layers have this method, and models call it."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        weights = {name: self.rounded(name) for name in self.quantized_names}

        def product(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
            if name not in weights:
                return linear(x, self.get_parameter(name), bias)
            return linear(self.rounded_input(x), weights[name], bias)

        def one(data: Tensor, sizes: list[int], states: States, suffix: str) -> tuple[Tensor, States]:
            bias_ih, bias_hh = (self._parameters.get(f"bias_{of}{suffix}") for of in ("ih", "hh"))

            def step(gates: Tensor, states: States) -> States:
                h, *others = CELLS[self.cell](gates, states, lambda h: product(h, f"weight_hh{suffix}", bias_hh))
                return (product(h, f"weight_hr{suffix}") if self.proj_size else h, *others)

            gates = product(data, f"weight_ih{suffix}", bias_ih)
            return scan(step, gates, states, sizes, suffix.endswith("_reverse"))

        return run_layers(self, input, hx, one)


class StudentExperts(Student):
    """Experts of mixture models."""

    def _adopt(self, layer: nn.Module) -> None:
        self._children: tuple[str, ...] = ()
        adopt(self, layer, {name: self.matrix(name).shape[0] for name in self.quantized_names})
        self._children = tuple(name for name, _ in layer.named_children())

    @property
    def float_layer(self) -> nn.Module:
        layer = super().float_layer
        for name in self._children:
            layer.add_module(name, self.get_submodule(name))
        return layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights = {name: self.rounded(name) for name in self.quantized_names}

        def product(x: Tensor, name: str, expert: int) -> Tensor:
            own = weights[name][rows_of(self, name, expert)]
            return linear(self.rounded_input(x), own, bias_of(self, name, expert))

        return run_experts(self, product, hidden_states, top_k_index, top_k_weights)


def _in_float(x: Tensor) -> bool:
    """Whether products of rounded x are float ones: autocast asks for another precision, and where there are no kernels those
    of integers in groups would take several times as long."""
    return x.device.type != "cpu" or torch.is_autocast_enabled("cpu")


STUDENTS: dict[type[QuantizedLayer], type[Student]] = {
    Linear: StudentLinear,
    FusedLinear: StudentLinear,
    Conv: StudentConv,
    Embedding: StudentEmbedding,
    EmbeddingBag: StudentEmbeddingBag,
    LSTM: StudentRecurrent,
    GRU: StudentRecurrent,
    Experts: StudentExperts,
}


def student_class(module: nn.Module) -> type[Student]:
    """The class of the twin of a module that has a ``float_class``."""
    return STUDENTS[layer_class(module)]
