"""Quantization-aware training by each peer.

A function of ``QAT`` takes a float model in eval mode, batches that calibrate, the bits and a function that trains: it is
given the fake-quantized model. They return a model that is evaluated as it is, in eager mode.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

Train = Callable[[nn.Module], None]
Make = Callable[[nn.Module, Sequence[Any], str, Train], nn.Module]
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}


def pt2e_config(weight_bits: int, input_bits: int) -> Any:
    """X86InductorQuantizer's own configuration for training, with fewer codes."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    values = replace(config.input_activation, quant_max=2**input_bits - 1)
    low, high = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    return replace(
        config,
        input_activation=values,
        output_activation=values,
        weight=replace(config.weight, quant_min=low, quant_max=high),
    )


def torchao_pt2e(model: nn.Module, calibration: Sequence[Any], bits: str, train: Train) -> nn.Module:
    """torchao's PT2E for x86. As in fewbit's recipes the first and the last layer have 8 bits, and so have the values that are
    added and pooled. Batch norm is part of the convolutions, with the statistics that it has."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    eight = pt2e_config(8, 8)

    class Quantizer(X86InductorQuantizer):  # type: ignore[misc]
        def annotate(self, graph: Any) -> Any:
            graph = super().annotate(graph)
            for node in graph.graph.nodes:
                found = node.meta.get("quantization_annotation")
                if found is not None and node.target not in (
                    torch.ops.aten.conv2d.default,
                    torch.ops.aten.linear.default,
                ):
                    for source, spec in found.input_qspec_map.items():
                        if isinstance(spec, QuantizationSpec):
                            found.input_qspec_map[source] = eight.input_activation
            return graph

    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    quantizer = Quantizer().set_global(pt2e_config(*BITS[bits]))
    for name in (layers[0], layers[-1]):
        quantizer.set_module_name_qconfig(name, eight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not strict, the graph of a model with a shared ReLU module is one that the quantizer refuses.
        program = torch.export.export(
            copy.deepcopy(model).train(),
            (calibration[0][:2],),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            strict=True,
        )
        prepared = prepare_qat_pt2e(program.module(check_guards=False), quantizer)
        move_exported_model_to_eval(prepared)
        with torch.no_grad():
            for batch in calibration:
                prepared(batch)
        train(prepared)
        return convert_pt2e(prepared)


def torchao_linear(model: nn.Module, calibration: Sequence[Any], bits: str, train: Train) -> nn.Module:
    """torchao's QATConfig for linear layers: inputs by row on the fly, 4-bit weights in groups of 32, 8-bit ones a channel."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight_bits, input_bits = BITS[bits]
    kinds = {4: torch.int4, 8: torch.int8}
    values = IntxFakeQuantizeConfig(kinds[input_bits], "per_token", is_symmetric=False)
    if weight_bits == 4:
        weight = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    else:
        weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    student = copy.deepcopy(model)
    quantize_(student, QATConfig(activation_config=values, weight_config=weight, step="prepare"))
    train(student)
    return student


QAT: dict[str, Make] = {"torchao PT2E QAT": torchao_pt2e, "torchao QAT": torchao_linear}
