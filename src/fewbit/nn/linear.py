"""Linear layers: torch's, and the transposed Conv1D of Hugging Face's GPT-2."""

from __future__ import annotations

from torch import Tensor, nn

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops import linear
from fewbit.qtensor import dequantize


class Linear(QuantizedLayer):
    """``[..., in_features]`` to ``[..., out_features]``."""

    bias: nn.Parameter | None

    @staticmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": weight if isinstance(module, nn.Linear) else weight.T}

    @staticmethod
    def channel_axis(module: nn.Module) -> int | None:
        return -1

    def _adopt(self, module: nn.Module) -> None:
        self.out_features, self.in_features = self._shapes["weight"]
        self.register_parameter("bias", module._parameters.get("bias"))

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, for code that reads it. Read only: a change to it is lost."""
        return dequantize(self.qtensor(), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.qtensor(), self.bias, self.scheme.input, self.input_scale, self.input_zero_point)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {super().extra_repr()}"
