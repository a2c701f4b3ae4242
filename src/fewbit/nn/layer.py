"""What a quantized layer is: an ordinary module whose weights are plain buffers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.qtensor import QTensor, fake_quantize, grid_parts, parts, scale_shape
from fewbit.spec import QuantSpec, Scheme


class QuantizedLayer(nn.Module):
    """The quantized twin of a float layer.

    Each weight W is kept as buffers ``W_packed``, ``W_scale`` and ``W_zero_point`` (asymmetric formats only); two-level
    scales as ``W_scale_packed``, ``W_scale_scale`` and so on. A static input grid is kept as ``input_scale`` and
    ``input_zero_point``. Everything else is as in the float layer. The layer computes in the dtype of its input.
    """

    accepts_input_spec = True  # whether the input can be quantized at all
    accepts_static_input = True  # whether its range can be fixed by calibration
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        scheme: Scheme,
        weights: Mapping[str, QTensor],
        input_grid: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.dtype: torch.dtype = next(
            iter(self.matrices(module).values())
        ).dtype  # that code sees which reads a weight
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        for name, weight in weights.items():
            for key, part in parts(weight, name).items():
                self.register_buffer(key, part)
        scale, zero_point = (None, None) if input_grid is None else input_grid
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)
        self._adopt(module)
        self._prepare()
        self.train(module.training)

    @staticmethod
    @abstractmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        """The weights of the float layer as ``[rows, columns]``, one row an output channel, by parameter name."""

    @staticmethod
    def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
        """The one weight of the float layer from its matrix."""
        return matrix

    @staticmethod
    def refuse(module: nn.Module) -> str | None:
        """Why this particular float layer cannot be quantized, or None."""
        return None

    @staticmethod
    def channel_axis(module: nn.Module) -> int | None:
        """The axis of the input's channels, counted from the end; None if the input tells nothing of the weights."""
        return None

    @staticmethod
    def importance(module: nn.Module, second_moment: Tensor) -> Tensor:
        """E[x^2] of what each weight multiplies, broadcastable to the weight matrix, from that of each channel."""
        return second_moment

    @staticmethod
    def pairs(module: nn.Module) -> tuple[Tensor, ...]:
        """Sets of disjoint pairs of the matrix' columns, ``[P, 2]``: those that engines multiply with neighbouring bytes."""
        return ()

    @abstractmethod
    def _adopt(self, module: nn.Module) -> None:
        """Take over what is not quantized: biases and settings."""

    def _prepare(self) -> None:
        """Keep what follows from the scheme and the shapes, so that a call need not find it out."""

    def qtensor(self, name: str = "weight") -> QTensor:
        """The quantized weight of this name."""
        scale, zero_point = stored_grid(self, f"{name}_", self.scheme.weight, self._shapes[name])
        return QTensor(self.get_buffer(f"{name}_packed"), scale, zero_point, self.scheme.weight, self._shapes[name])

    def weight_only(self) -> QuantizedLayer:
        """The same layer, sharing its buffers, with the input left in float."""
        twin = copy.copy(self)
        twin.scheme = replace(self.scheme, input=None)
        twin._prepare()
        return twin

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` as the layer sees it: rounded to the input's grid, in x's dtype."""
        spec = self.scheme.input
        return x if spec is None else fake_quantize(x, spec, self.input_scale, self.input_zero_point)

    def extra_repr(self) -> str:
        def words(spec: QuantSpec | None) -> str:
            return "float" if spec is None else f"{spec.format} per {spec.granularity.kind}"

        return f"weight {words(self.scheme.weight)}, input {words(self.scheme.input)}"

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._prepare()  # with assign=True dtypes may be others

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        # model.half() and .to(torch.bfloat16) are for what is float by nature: scales are part of the codes' meaning.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self.dtype = fn(torch.zeros((), dtype=self.dtype)).dtype
        return self


def store_grid(module: nn.Module, scale: Tensor | QTensor, zero_point: Tensor | None) -> None:
    """Scale and zero point as buffers ``scale`` and ``zero_point``."""
    for name, part in grid_parts(scale, zero_point, "").items():
        module.register_buffer(name, part)


def stored_grid(
    module: nn.Module, prefix: str, spec: QuantSpec, shape: tuple[int, ...]
) -> tuple[Tensor | QTensor, Tensor | None]:
    """Scale and zero point of a tensor of this spec and shape from buffers ``<prefix>scale`` and so on."""
    zero_point = None if spec.symmetric else module.get_buffer(f"{prefix}zero_point")
    if spec.scale is None:
        return module.get_buffer(f"{prefix}scale"), zero_point
    blocks = scale_shape(shape, spec.granularity)
    packed = module.get_buffer(f"{prefix}scale_packed")
    return QTensor(packed, *stored_grid(module, f"{prefix}scale_", spec.scale, blocks), spec.scale, blocks), zero_point


def input_placeholder(spec: QuantSpec | None) -> tuple[Tensor, Tensor | None] | None:
    """The buffers of a static input grid without data, on meta; None if there is no static grid."""
    if spec is None or not spec.is_static:
        return None
    zero_point = None if spec.symmetric else torch.empty(1, dtype=spec.number.dtype, device="meta")
    return torch.empty(1, dtype=torch.float32, device="meta"), zero_point
