"""Linear layers: torch's, and the transposed Conv1D of Hugging Face's GPT-2."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops.linear import DTYPES, as_kernels_read, call, linear, numbers_of
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
        # Kernels read scales of one level, and 6-bit codes as bytes.
        self._two_levels, self._six_bits = isinstance(weight.scale, QTensor), weight.spec.format == "int6"
        self._sources = [name for name in self._buffers if name.startswith("weight_") and name != "weight_zero_point"]
        self._kept: tuple[list[Tensor], list[int], tuple[Tensor, Tensor]] | None = None
        if self._two_levels:
            values = torch.empty(weight.scale.shape, dtype=scale_dtype(weight.spec), device="meta")
            weight = replace(weight, scale=values, spec=replace(weight.spec, scale=None))
        if self._six_bits:
            weight = replace(weight, spec=replace(weight.spec, format="int8"))
        self._numbers = numbers_of(weight, self.scheme.input, self.activation)

    def _for_kernels(self) -> tuple[Tensor, Tensor]:
        """Codes and scales as kernels read them. Kept while the buffers stay as they are: whoever loads or moves a model need
        not know."""
        sources = [self.get_buffer(name) for name in self._sources]
        versions = [0 if x.is_inference() else x._version for x in sources]
        kept = self._kept
        if kept is not None and versions == kept[1] and all(map(operator.is_, sources, kept[0])):
            return kept[2]
        weight = as_kernels_read(self.qtensor())
        codes, scale = weight.packed, cast(Tensor, weight.scale)
        if not torch.compiler.is_compiling():
            self._kept = (sources, versions, (codes, scale))
        return codes, scale

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

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
        if self._two_levels or self._six_bits:
            packed, scale = self._for_kernels()
        else:
            packed, scale = buffers["weight_packed"], buffers["weight_scale"]
        return call(input, packed, scale, buffers.get("weight_zero_point"), self._parameters["bias"], numbers)

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", {self.activation}"
        return f"{self.in_features} -> {self.out_features}{activation}, {super().extra_repr()}"


class FusedLinear(Linear):
    """A linear layer with its activation, as ``transforms.fuse_activation`` leaves it."""

    def _adopt(self, module: nn.Module) -> None:
        super()._adopt(module)
        self.activation = str(module.activation)
