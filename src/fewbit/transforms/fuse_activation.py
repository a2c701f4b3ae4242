"""An activation that follows a linear layer becomes part of it: compiled kernels apply it to what they have at hand."""

from __future__ import annotations

from torch import Tensor, nn

from fewbit.graph import Topology
from fewbit.ops.linear import ACTIVATIONS
from fewbit.transforms.fold_batch_norm import is_watched

# By qualified name: transformers is not imported. Its own formulas of the tanh approximation differ by rounding.
FUSABLE: dict[str, str] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


class Linear(nn.Linear):
    """torch.nn.Linear and ``activation``, one of ACTIVATIONS. To rules it is a Linear too."""

    activation: str

    def forward(self, input: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation][0](super().forward(input))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def find_activations(model: nn.Module, topology: Topology) -> list[tuple[str, str, str]]:
    """(linear layer, activation module, its name in ACTIVATIONS).

    Nothing but the activation reads the layer's results, and it reads nothing but results of such layers.
    """
    modules = dict(model.named_modules())
    found: list[tuple[str, str, str]] = []
    for name, module in modules.items():
        kind = _kind(module)
        layers = topology.sources(name)
        if kind is not None and not is_watched(module) and layers:
            fusable = all(
                type(modules.get(layer)) is nn.Linear
                and not is_watched(modules[layer])
                and topology.readers(layer) == {name}
                for layer in layers
            )
            found.extend((layer, name, kind) for layer in sorted(layers) if fusable)
    return found


def fuse_activations(model: nn.Module, places: list[tuple[str, str, str]]) -> None:
    """Do so in place. The modules change their class, so that it does not matter who else holds them."""
    for layer_name, activation_name, kind in places:
        layer = model.get_submodule(layer_name)
        activation = model.get_submodule(activation_name)
        is_one = type(activation) is nn.Identity or _kind(activation) == kind  # it may have become Identity already
        if type(layer) is not nn.Linear or kind not in ACTIVATIONS or not is_one:
            found = f"{type(layer).__name__} and {type(activation).__name__}"
            raise ValueError(f"{layer_name!r} and {activation_name!r} are {found}, not a Linear and its {kind!r}")
        layer.__class__ = Linear
        vars(layer)["activation"] = kind
        activation.__class__ = nn.Identity
        vars(activation).clear()  # methods of its old class, too
        vars(activation).update(vars(nn.Identity().train(layer.training)))


def _kind(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return FUSABLE.get(f"{type(module).__module__}.{type(module).__qualname__}")
