"""Linear layers: torch's, and the transposed Conv1D of Hugging Face's GPT-2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops.linear import DTYPES, call, linear, numbers_of
from fewbit.qtensor import QTensor, dequantize, scale_dtype


class Linear(QuantizedLayer):
    """``[..., in_features]`` to ``[..., out_features]``."""

    bias: nn.Parameter | None
    activation: str = "none"  # what follows, of fewbit.ops.linear.ACTIVATIONS

    @staticmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": weight if isinstance(module, nn.Linear) else weight.T}

    @staticmethod
    def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix if isinstance(module, nn.Linear) else matrix.T

    @staticmethod
    def channel_axis(module: nn.Module) -> int | None:
        return -1

    @staticmethod
    def pairs(module: nn.Module) -> tuple[Tensor, ...]:
        columns = Linear.matrices(module)["weight"].shape[1]
        return (torch.arange(columns // 2 * 2).reshape(-1, 2),)

    def _adopt(self, module: nn.Module) -> None:
        self.out_features, self.in_features = self._shapes["weight"]
        self.register_parameter("bias", module._parameters.get("bias"))

    def _prepare(self) -> None:
        weight = self.qtensor()
        self._kept: tuple[Tensor, Tensor, int, Tensor] | None = None
        self._two_levels = isinstance(weight.scale, QTensor)
        if self._two_levels:  # kernels read scales of one level
            values = torch.empty(weight.scale.shape, dtype=scale_dtype(weight.spec), device="meta")
            weight = replace(weight, scale=values, spec=replace(weight.spec, scale=None))
        self._numbers = numbers_of(weight, self.scheme.input, self.activation)

    def _scale_values(self) -> Tensor:
        """What scales of two levels stand for, as kernels read them. Kept while the buffers stay as they are: whoever loads
        or moves a model need not know."""
        codes, steps = self._buffers["weight_scale_packed"], self._buffers["weight_scale_scale"]
        assert codes is not None and steps is not None
        version = 0 if codes.is_inference() else codes._version
        kept = self._kept
        if kept is not None and kept[0] is codes and kept[1] is steps and kept[2] == version:
            return kept[3]
        weight = self.qtensor()
        values = weight.scale_values.to(scale_dtype(weight.spec))
        if not torch.compiler.is_compiling():
            self._kept = (codes, steps, version, values)
        return values

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, for code that reads it. Read only: a change to it is lost."""
        return dequantize(self.qtensor(), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        numbers = self._numbers
        if numbers is None or input.dtype not in DTYPES:
            grid = (self.input_scale, self.input_zero_point)
            return linear(input, self.qtensor(), self.bias, self.scheme.input, *grid, activation=self.activation)
        # The dicts: nn.Module finds attributes slowly, and at batch 1 that is time.
        buffers: dict[str, Any] = self._buffers
        scale = self._scale_values() if self._two_levels else buffers["weight_scale"]
        packed, zero_point = buffers["weight_packed"], buffers.get("weight_zero_point")
        return call(input, packed, scale, zero_point, self._parameters["bias"], numbers)

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", {self.activation}"
        return f"{self.in_features} -> {self.out_features}{activation}, {super().extra_repr()}"


class FusedLinear(Linear):
    """A linear layer with its activation, as ``transforms.fuse_activation`` leaves it."""

    def _adopt(self, module: nn.Module) -> None:
        super()._adopt(module)
        self.activation = str(module.activation)
