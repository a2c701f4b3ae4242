"""Which float layers have quantized twins: one line an entry."""

from __future__ import annotations

from torch import nn

from fewbit.nn.conv import Conv
from fewbit.nn.embedding import Embedding, EmbeddingBag
from fewbit.nn.experts import Experts, is_experts
from fewbit.nn.layer import QuantizedLayer
from fewbit.nn.linear import FusedLinear, Linear
from fewbit.nn.recurrent import GRU, LSTM

# By the float class's qualified name: classes of optional packages are named without importing them.
LAYERS: dict[str, type[QuantizedLayer]] = {
    "torch.nn.modules.linear.Linear": Linear,
    "transformers.pytorch_utils.Conv1D": Linear,
    "fewbit.transforms.fuse_activation.Linear": FusedLinear,
    "torch.nn.modules.conv.Conv1d": Conv,
    "torch.nn.modules.conv.Conv2d": Conv,
    "torch.nn.modules.conv.Conv3d": Conv,
    "torch.nn.modules.conv.ConvTranspose1d": Conv,
    "torch.nn.modules.conv.ConvTranspose2d": Conv,
    "torch.nn.modules.conv.ConvTranspose3d": Conv,
    "torch.nn.modules.sparse.Embedding": Embedding,
    "torch.nn.modules.sparse.EmbeddingBag": EmbeddingBag,
    "torch.nn.modules.rnn.LSTM": LSTM,
    "torch.nn.modules.rnn.GRU": GRU,
}


def float_class(module: nn.Module) -> type[nn.Module] | None:
    """The class in LAYERS that ``module`` is an instance of, its own if it is one of transformers' experts, or None."""
    for cls in type(module).__mro__:
        if qualified_name(cls) in LAYERS:
            return cls
    return type(module) if is_experts(module) else None


def layer_class(module: nn.Module) -> type[QuantizedLayer]:
    """The quantized twin's class of a module that has a ``float_class``."""
    cls = float_class(module)
    assert cls is not None
    return LAYERS.get(qualified_name(cls), Experts)


def kind_of(module: nn.Module) -> str:
    """What rules and plans call the layer: the name of its ``float_class``, ``Experts``, or that of its own class."""
    return "Experts" if is_experts(module) else (float_class(module) or type(module)).__name__


def qualified_name(cls: type) -> str:
    """The key of a class in LAYERS."""
    return f"{cls.__module__}.{cls.__qualname__}"
