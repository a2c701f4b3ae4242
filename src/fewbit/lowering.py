"""From a quantized model to the explicit graph that engines are given."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fewbit.batches import Call
from fewbit.errors import UnsupportedError
from fewbit.graph import Graph, read_graph
from fewbit.graph.explicit import IntegerLayer, explicit
from fewbit.nn import Conv, Linear, QuantizedLayer
from fewbit.pipeline import plan_of, sites_of
from fewbit.spec import PER_TENSOR, per_channel


def explicit_graph(model: nn.Module, call: Call, wide_sums: bool = True) -> tuple[GraphModule, bool]:
    """A quantized model's graph on these inputs in the explicit form of ``graph.explicit``, and whether it is one for any
    batch size. ``wide_sums``: see there.

    UnsupportedError if the model does not export or has no layer with a static 8-bit input.
    """
    plan = plan_of(model)
    layers = {name: layer for name, layer in sites_of(model) if is_integer(layer)}
    if not layers:
        raise UnsupportedError(
            f"recipe {plan.recipe.name!r} left no layer with int8 or int4 weights and a static uint8 input, which engines "
            "compute in integers: quantize with 'int8-static'."
        )
    dtypes = {layer.dtype for layer in layers.values()} - {torch.float32}
    if dtypes:
        raise UnsupportedError(
            f"engines take float32, this {type(model).__name__} is {dtypes.pop()}: quantize model.float()."
        )
    graph = read_graph(_float_layers(model, layers), call.args, call.kwargs, layers)
    if not isinstance(graph, Graph):
        raise UnsupportedError(f"this {type(model).__name__} cannot be lowered: {graph}")
    if not graph.layers:
        raise UnsupportedError(f"engines take batches of images and vectors, found {call.describe()}.")
    module = explicit(graph, {name: _integer_layer(layer) for name, layer in layers.items()}, plan.results, wide_sums)
    return module, graph.any_batch


def is_integer(layer: QuantizedLayer) -> bool:
    """Whether engines can compute this layer in integers: a convolution of images or a linear layer, static, 8 bits."""
    scheme = layer.scheme
    spec = scheme.input
    if spec is None or spec.format != "uint8" or not spec.is_static or spec.granularity != PER_TENSOR:
        return False
    weight = scheme.weight
    if weight.format not in ("int8", "int4") or not weight.symmetric:  # 4-bit codes are 8-bit codes too
        return False
    if weight.granularity != per_channel(0) or weight.scale is not None:
        return False
    if isinstance(layer, Conv):
        return layer.geometry.dims == 2 and not layer.geometry.transposed
    return isinstance(layer, Linear) and layer.activation == "none"


def _integer_layer(layer: QuantizedLayer) -> IntegerLayer:
    weight = layer.qtensor()
    codes = layer.geometry.weight(weight.codes) if isinstance(layer, Conv) else weight.codes
    bias = layer._parameters.get("bias")
    assert layer.input_scale is not None
    zero_point = 0 if layer.input_zero_point is None else int(layer.input_zero_point)
    return IntegerLayer(
        codes=codes,
        scale=weight.scale_values.reshape(-1),
        bias=None if bias is None else bias.detach().float(),
        input_scale=float(layer.input_scale),
        input_zero_point=zero_point,
    )


def _float_layers(model: nn.Module, layers: dict[str, QuantizedLayer]) -> nn.Module:
    """A copy of the model with these layers as torch's own, weights dequantized: what torch.export sees as one operator."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    replacements = {twin.get_submodule(name): _float_layer(layer) for name, layer in layers.items()}
    for parent in list(twin.modules()):
        for child, layer in parent._modules.items():
            if layer in replacements:
                parent._modules[child] = replacements[layer]
    return replacements.get(twin, twin).eval()


def _float_layer(layer: QuantizedLayer) -> nn.Module:
    module: Any
    bias = layer._parameters.get("bias")
    if isinstance(layer, Conv):
        geometry = layer.geometry
        outputs, channels, *kernel = geometry.weight_shape
        make: Any = nn.Conv2d  # its types want pairs; ours are tuples of any length
        module = make(
            channels * geometry.groups,
            outputs,
            tuple(kernel),
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            bias is not None,
            layer.padding_mode,
            device="meta",
        )
        if layer.padding_mode != "zeros":
            module._reversed_padding_repeated_twice = list(layer.padding_amounts)
    else:
        assert isinstance(layer, Linear)
        module = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    weight: Any = layer.weight
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module.eval()
