"""Convolutions and transposed convolutions of one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops import Geometry, conv
from fewbit.qtensor import dequantize


class Conv(QuantizedLayer):
    """``[batch, in_channels, ...]`` to ``[batch, out_channels, ...]``, batch optional."""

    bias: nn.Parameter | None

    @staticmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": geometry_of(module).matrix(weight)}

    @staticmethod
    def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
        return geometry_of(module).weight(matrix)

    @staticmethod
    def channel_axis(module: nn.Module) -> int | None:
        return -1 - geometry_of(module).dims

    @staticmethod
    def importance(module: nn.Module, second_moment: Tensor) -> Tensor:
        # Row o sees the channels of its group, each at every kernel position.
        geometry = geometry_of(module)
        outputs = geometry.weight_shape[1] if geometry.transposed else geometry.weight_shape[0] // geometry.groups
        grouped = second_moment.reshape(geometry.groups, -1)
        columns = grouped.repeat_interleave(geometry.terms // grouped.shape[1], dim=1)
        return columns.repeat_interleave(outputs, dim=0)

    @staticmethod
    def pairs(module: nn.Module) -> tuple[Tensor, ...]:
        # Channels are the innermost axis: of one kernel position in OpenVINO, of all in turn in ONNX Runtime. Depthwise
        # convolutions, with one channel in and one out a group, are computed in int32.
        geometry = geometry_of(module)
        channels = 0 if geometry.transposed else geometry.weight_shape[1]
        if channels == 0 or (geometry.weight_shape[:2] == (geometry.groups, 1) and geometry.groups > 1):
            return ()
        columns = torch.arange(geometry.terms).reshape(channels, -1).T  # [positions, channels]
        in_turn = columns.flatten()[: geometry.terms // 2 * 2].reshape(-1, 2)
        if channels == 1 or channels % 2 == 0:
            return (in_turn,)
        return in_turn, columns[:, : channels - 1].reshape(-1, 2)

    def _adopt(self, module: nn.Module) -> None:
        self.geometry = geometry_of(module)
        self.register_parameter("bias", module._parameters.get("bias"))
        # A padding that repeats the input is made before the convolution.
        self.padding_mode = str(module.padding_mode)
        amounts: Any = module._reversed_padding_repeated_twice if self.padding_mode != "zeros" else ()
        self.padding_amounts = list(amounts)

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, for code that reads it. Read only: a change to it is lost."""
        return self.geometry.weight(dequantize(self.qtensor(), self.dtype))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        geometry = self.geometry
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self.padding_amounts, mode=self.padding_mode)
        if output_size is not None:
            geometry = geometry.with_output_size(tuple(input.shape), output_size)
        grid = (self.scheme.input, self.input_scale, self.input_zero_point)
        return conv(input, self.qtensor(), self.bias, geometry, *grid)

    def extra_repr(self) -> str:
        kind = "transposed, " if self.geometry.transposed else ""
        return f"{kind}weight {self.geometry.weight_shape}, {super().extra_repr()}"


def geometry_of(module: nn.Module) -> Geometry:
    """The geometry of a float convolution."""
    settings: Any = module
    padded = settings.padding_mode != "zeros"
    return Geometry(
        weight_shape=tuple(settings.weight.shape),
        transposed=settings.transposed,
        stride=settings.stride,
        padding=(0,) * len(settings.stride) if padded else settings.padding,
        output_padding=settings.output_padding,
        dilation=settings.dilation,
        groups=settings.groups,
    )
