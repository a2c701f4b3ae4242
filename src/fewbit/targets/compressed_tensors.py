"""compressed-tensors, the format that vLLM and transformers load: https://github.com/vllm-project/compressed-tensors

"pack-quantized": int4 in groups, symmetric. "int-quantized": int8 a row, activations int8 a row on the fly. Only linear layers
are quantized there: tables of embeddings, and output layers tied to them, become float again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.nn import Experts, Linear, QuantizedLayer
from fewbit.pipeline import sites_of
from fewbit.qtensor import dequantize
from fewbit.source import CONFIG, SINGLE, copy_texts, read_config
from fewbit.spec import PER_TOKEN, QuantSpec, Scheme, per_channel
from fewbit.targets.native import load, next_name
from fewbit.tensorfile import TensorWriter

INT8 = QuantSpec("int8", PER_TOKEN)


def export_compressed_tensors(folder: Path, out: Path) -> Path:
    """Write the language model in ``folder`` to the folder ``out``; returns it.

    UnsupportedError if its linear layers have other schemes than the format, or several. CheckpointError if ``folder``
    cannot be read, or ``out`` cannot be written or has a model already.
    """
    model: Any = load(folder)
    if (out / SINGLE).exists():
        raise CheckpointError(f"{out}: has a {SINGLE} already; give a new folder, or delete it.")
    sites = dict(sites_of(model))
    for name, site in sites.items():
        if isinstance(site, Experts):
            raise UnsupportedError(
                f"{folder}: {name}: experts of a mixture model are not written as compressed-tensors; exclude them."
            )
    uses = Counter(id(site.weight_packed) for site in sites.values())
    linear = {name: site for name, site in sites.items() if type(site) is Linear and uses[id(site.weight_packed)] == 1}
    group = _group(linear, folder)
    floats = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Linear)) and name not in linear
    ]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": floats,
    }
    tensors = _tensors(model, sites, linear)
    try:
        out.mkdir(parents=True, exist_ok=True)
        copy_texts(folder, out)
        config = {**read_config(folder), "quantization_config": quantization}
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with TensorWriter(next_name(out, SINGLE), tensors, {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        next_name(out, SINGLE).replace(out / SINGLE)
    except OSError as error:
        next_name(out, SINGLE).unlink(missing_ok=True)
        raise CheckpointError(f"{out}: cannot be written: {error}. Give a folder that you may write to.") from error
    return out


def _group(linear: Mapping[str, QuantizedLayer], folder: Path) -> dict[str, Any]:
    """What the format says of the linear layers, which must be quantized alike."""
    schemes = {json.dumps(site.scheme.to_json()): (name, site.scheme) for name, site in linear.items()}
    if len(schemes) != 1:
        found = ", ".join(f"{name}: {scheme.weight.format}" for name, scheme in schemes.values()) or "none"
        raise UnsupportedError(f"{folder}: compressed-tensors needs linear layers of one scheme, found {found}.")
    [(name, scheme)] = schemes.values()
    plain = {"type": "int", "symmetric": True}
    if _is_int4(scheme):
        size = scheme.weight.granularity.group_size
        weights = {"num_bits": 4, **plain, "strategy": "group", "group_size": size, "dynamic": False}
        return {"format": "pack-quantized", "weights": weights, "input_activations": None}
    if scheme.weight.to_json() == QuantSpec("int8", per_channel(0)).to_json() and scheme.input == INT8:
        weights = {"num_bits": 8, **plain, "strategy": "channel", "dynamic": False}
        inputs = {"num_bits": 8, **plain, "strategy": "token", "dynamic": True}
        return {"format": "int-quantized", "weights": weights, "input_activations": inputs}
    raise UnsupportedError(
        f"{folder}: {name}: compressed-tensors gets symmetric int4 in groups with float inputs, or int8 a row with int8 "
        f"inputs on the fly; found {'' if scheme.weight.symmetric else 'asymmetric '}{scheme.weight.format} per "
        f"{scheme.weight.granularity.kind}. Recipes int4-symmetric and int4-compact make such weights."
    )


def _is_int4(scheme: Scheme) -> bool:
    spec = scheme.weight
    grouped = spec.format == "int4" and spec.granularity.kind == "group" and spec.symmetric and spec.scale is None
    return grouped and scheme.input is None


def _tensors(
    model: nn.Module, sites: Mapping[str, QuantizedLayer], linear: Mapping[str, QuantizedLayer]
) -> dict[str, Tensor]:
    """The tensors by the names of the format, each once."""
    tensors: dict[str, Tensor] = {}
    done: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if owner in sites and key != "bias":
            if key != "weight_packed" or id(tensor) in done:
                continue
            weight = sites[owner].qtensor()
            if owner not in linear:
                tensors[f"{owner}.weight"] = dequantize(weight, sites[owner].dtype)
            elif weight.spec.number.bits == 8:
                assert isinstance(weight.scale, Tensor)
                tensors |= {f"{owner}.weight": weight.packed, f"{owner}.weight_scale": weight.scale}
            else:
                assert isinstance(weight.scale, Tensor)
                tensors |= {name: weight.packed, f"{owner}.weight_scale": weight.scale}
                tensors[f"{owner}.weight_shape"] = torch.tensor(weight.shape)
        elif id(tensor) not in done:
            tensors[name] = tensor.detach()
        done.add(id(tensor))
    return tensors
