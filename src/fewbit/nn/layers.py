"""Which float layers have quantized twins: one line an entry."""

from __future__ import annotations

from torch import nn

from fewbit.nn.conv import Conv
from fewbit.nn.embedding import Embedding, EmbeddingBag
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
    """The class in LAYERS that ``module`` is an instance of, or None."""
    for cls in type(module).__mro__:
        if qualified_name(cls) in LAYERS:
            return cls
    return None


def layer_class(module: nn.Module) -> type[QuantizedLayer]:
    """The quantized twin's class of a module that has a ``float_class``."""
    cls = float_class(module)
    assert cls is not None
    return LAYERS[qualified_name(cls)]


def qualified_name(cls: type) -> str:
    """The key of a class in LAYERS."""
    return f"{cls.__module__}.{cls.__qualname__}"
