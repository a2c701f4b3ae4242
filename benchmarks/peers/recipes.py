"""fewbit as a candidate: its recipes."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import fewbit
from peers.layer import GROUP, Layer, from_module, linear


def int4_dynamic() -> fewbit.Recipe:
    """4-bit weights and 8-bit activations, both in groups of 32."""
    if "int4-dynamic" in fewbit.presets():
        return fewbit.load_recipe("int4-dynamic")
    weight = fewbit.QuantSpec("int4", fewbit.per_group(GROUP), scale_dtype="bfloat16")
    scheme = fewbit.Scheme(weight, fewbit.QuantSpec("int8", fewbit.per_group(GROUP)), method="mse")
    rule = fewbit.Rule("type:Linear|Conv1D|LSTM|GRU", scheme, min_weights=1024, optional=True)
    return fewbit.Recipe("int4-dynamic", (rule,), ("split_attention",))


def int8_weight_only() -> fewbit.Recipe:
    scheme = fewbit.Scheme(fewbit.QuantSpec("int8", fewbit.per_channel()))
    return fewbit.Recipe("int8-weight-only", (fewbit.Rule("type:Linear", scheme),))


def rounded(recipe: fewbit.Recipe) -> fewbit.Recipe:
    """The recipe with every method plain rounding: for speed the codes do not matter, and they are found sooner."""
    rules = [
        rule if rule.scheme is None else replace(rule, scheme=replace(rule.scheme, method="rtn"))
        for rule in recipe.rules
    ]
    return replace(recipe, rules=tuple(rules))


def fewbit_linear(recipe: fewbit.Recipe, weight: Tensor) -> Layer:
    return from_module(fewbit.quantize(linear(weight), rounded(recipe)))
