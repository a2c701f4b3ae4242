"""Experts of mixture models as transformers keeps them: for each projection one parameter ``[experts, out, in]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fewbit.nn.layer import QuantizedLayer
from fewbit.ops.linear import linear
from fewbit.qtensor import one_level, rows

SETTINGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
Product = Callable[[Tensor, str, int], Tensor]  # of inputs with the projection of this name of one expert


def is_experts(module: nn.Module) -> bool:
    """Whether ``transformers.integrations.moe.use_experts_implementation`` made the class: all that it makes are alike."""
    down = module._parameters.get("down_proj")
    known = all(isinstance(vars(module).get(name), bool) for name in SETTINGS)
    return known and down is not None and down.dim() == 3


class Experts(QuantizedLayer):
    """Tokens ``[n, hidden]``, the experts of each ``[n, k]`` and their weights ``[n, k]`` to ``[n, hidden]``.

    The matrix of a projection has the rows of all experts, one expert's after the other's. Which inputs an expert gets is
    not observed: weights are rounded as if all mattered alike.
    """

    accepts_static_input = False

    @staticmethod
    def matrices(module: nn.Module) -> dict[str, Tensor]:
        weights = {name: module.get_parameter(name) for name in projections(module)}
        swapped = bool(vars(module)["is_transposed"])
        return {name: (w.transpose(1, 2) if swapped else w).flatten(0, 1) for name, w in weights.items()}

    @staticmethod
    def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
        settings: Any = module
        weights = matrix.unflatten(0, (int(settings.num_experts), -1))
        return weights.transpose(1, 2) if settings.is_transposed else weights

    def _adopt(self, module: nn.Module) -> None:
        adopt(self, module, {name: shape[0] for name, shape in self._shapes.items()})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights = {name: self.qtensor(name) for name in self._shapes}

        def product(x: Tensor, name: str, expert: int) -> Tensor:
            own = one_level(rows(weights[name], rows_of(self, name, expert)))
            return linear(x, own, bias_of(self, name, expert), self.scheme.input)

        return run_experts(self, product, hidden_states, top_k_index, top_k_weights)


def projections(module: nn.Module) -> tuple[str, str]:
    """The names of the first projection and of the second."""
    return ("gate_up_proj" if vars(module)["has_gate"] else "up_proj"), "down_proj"


def adopt(layer: Any, module: Any, rows: Mapping[str, int]) -> None:
    """What the experts have beside the projections, whose ``rows`` are counted: settings, activation, norm and biases."""
    settings = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    vars(layer).update(settings, apply_gate=type(module)._apply_gate)
    layer.rows = {name: count // module.num_experts for name, count in rows.items()}
    for name, child in module.named_children():
        layer.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False):
        if name not in rows:
            layer.register_parameter(name, parameter)


def rows_of(layer: Any, name: str, expert: int) -> slice:
    """Where an expert's rows are in the matrix of a projection."""
    size = layer.rows[name]
    return slice(expert * size, (expert + 1) * size)


def bias_of(layer: Any, name: str, expert: int) -> Tensor | None:
    """``[out]``."""
    return layer.get_parameter(f"{name}_bias")[expert] if layer.has_bias else None


def run_experts(
    layer: Any, product: Product, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of what the chosen experts make of each token; see ``batched_mm_experts_forward`` of transformers."""
    first, second = projections(layer)
    count, k = top_k_index.shape
    chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
    outputs = hidden_states.new_zeros(count * k, hidden_states.shape[-1])
    for expert in chosen.unique().tolist():
        places = (chosen == expert).nonzero().squeeze(1)
        y = product(hidden_states[places // k], first, expert)
        y = layer.apply_gate(layer, y) if layer.has_gate else layer.act_fn(y)
        y = product(y, second, expert)
        if getattr(layer, "has_post_expert_norm", False):
            y = layer.post_expert_norm(y)
        outputs = outputs.index_copy(0, places, (y * weights[places, None]).to(outputs.dtype))
    return outputs.view(count, k, hidden_states.shape[-1]).sum(1)
