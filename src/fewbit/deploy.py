"""The verbs that take a quantized model to an engine: lower and export."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fewbit.batches import Call, to_call
from fewbit.errors import FewbitError, UnsupportedError, unknown
from fewbit.lowering import explicit_graph
from fewbit.pipeline import plan_of
from fewbit.report import write_text
from fewbit.targets import FOLDER_FORMATS, TARGETS, Lowered
from fewbit.targets.onnx import onnx_model, write_onnx
from fewbit.targets.target import Target, lowered, refuse_device, relative_difference

# Beyond this the engine does not compute what the codes say. Rounding in another order stays below a quarter of it.
LARGEST_DIFFERENCE = 0.15


def lower(model: nn.Module, example_inputs: Any, target: str = "torch") -> Lowered:
    """The quantized model as an engine runs it in integers: "torch" (fewbit's own kernels), "onnxruntime" or "openvino".

    ``example_inputs``: one batch, whose shapes but for the batch size the result is for. ``model`` is one that fewbit
    quantized with a static recipe; it is not changed. Engines use as many threads as torch does now.

    Raises PlanError for a model that fewbit did not quantize; UnsupportedError if it does not export, has nothing to run in
    integers, the engine is not installed, or computes something else than fewbit's kernels on the example inputs.
    """
    engine = TARGETS[check_target(target)]
    call = to_call(model, example_inputs, "example_inputs")
    refuse_device(call)
    module, any_batch = _graph_for(target, model, call)
    made = lowered(engine, module, call, any_batch)
    if target != "torch":
        made.difference = _difference(made, model, call, engine)
    return made


def export(
    model: nn.Module,
    path: str | Path,
    target: str = "onnxruntime",
    *,
    example_inputs: Any,
    notes: str = "",
) -> Path:
    """Write the quantized model to ``path`` (NAME.onnx) for an engine, and beside it a card, NAME.json; returns ``path``.

    The card says what the file takes and gives, from which recipe it was made, what the engine runs in int8, and how far
    its outputs are from fewbit's own kernels on the example inputs; ``notes`` (how to prepare inputs, say) are put in it.
    Raises as ``lower``.
    """
    engine = TARGETS[check_target(target)]
    path = Path(path)
    if target == "torch" or path.suffix != ".onnx":
        raise UnsupportedError(
            f"{path}: targets 'onnxruntime' and 'openvino' are exported as NAME.onnx. For PyTorch save the quantized model "
            "with fewbit.save, and lower it where it runs: packed weights are for one CPU."
        )
    call = to_call(model, example_inputs, "example_inputs")
    refuse_device(call)
    made = lowered(engine, _graph_for(target, model, call)[0], call, True)
    made.difference = _difference(made, model, call, engine)
    proto = onnx_model(_graph_for(target, model, call)[0], call)
    try:
        write_onnx(proto, path)
        write_text(path.with_suffix(".json"), json.dumps(_card(proto, model, made, notes), indent=1))
    except OSError as error:
        raise FewbitError(f"{path}: cannot be written: {error}. Give a place that you may write to.") from error
    return path


def export_folder(folder: str | Path, out: str | Path, format: str) -> Path:
    """Write the quantized language model in ``folder`` in another format; returns ``out``.

    "compressed-tensors" (``out`` is a folder), which vLLM and transformers load; "gguf" (a file), for llama.cpp. Both need
    transformers, the second one the package gguf.

    Raises UnsupportedError for a format that does not exist or cannot hold the model, or a package that is missing;
    CheckpointError if ``folder`` cannot be read or ``out`` cannot be written.
    """
    if format not in FOLDER_FORMATS:
        raise UnsupportedError(unknown("format", format, FOLDER_FORMATS))
    return FOLDER_FORMATS[format](Path(folder), Path(out))


def installed() -> list[str]:
    """The names of the targets that can be used here."""
    return [name for name, target in TARGETS.items() if target.missing() is None]


def check_target(name: str) -> str:
    """``name``; UnsupportedError if there is no such target or it is not installed."""
    if name not in TARGETS:
        raise UnsupportedError(unknown("target", name, TARGETS))
    missing = TARGETS[name].missing()
    if missing is not None:
        raise UnsupportedError(missing)
    return name


def _graph_for(target: str, model: nn.Module, call: Call) -> tuple[GraphModule, bool]:
    """Others than fewbit fuse only what is quantized on both sides, also where they add before they round, as OpenVINO does."""
    return explicit_graph(model, call, wide_sums=target == "torch")


def integer_reference(model: nn.Module, call: Call, engine: Target) -> Lowered:
    """What ``engine`` is to compute, computed by fewbit's own kernels: they round where it does."""
    module, any_batch = explicit_graph(model, call, engine.wide_sums)
    return lowered(TARGETS["torch"], module, call, any_batch)


def _difference(made: Lowered, model: nn.Module, call: Call, engine: Target) -> float:
    """From the integer reference; UnsupportedError if it is too large to be rounding."""
    reference = integer_reference(model, call, engine)
    with torch.no_grad():
        difference = relative_difference(call.run(made), call.run(reference))
    if not difference <= LARGEST_DIFFERENCE:
        raise UnsupportedError(
            f"{made.target} computes something else than the codes say: its outputs are {100 * difference:.1f} % away on the "
            "example inputs. On CPUs without VNNI that is how saturating 16-bit sums look: quantize with method 'pair_safe'."
        )
    return difference


def _card(proto: Any, model: nn.Module, made: Lowered, notes: str) -> dict[str, Any]:
    def described(item: Any) -> dict[str, Any]:
        import onnx

        kind = item.type.tensor_type
        shape = [axis.dim_value or "batch" for axis in kind.shape.dim]
        return {"name": item.name, "dtype": onnx.TensorProto.DataType.Name(kind.elem_type).lower(), "shape": shape}

    plan = plan_of(model)
    return {
        "fewbit": version("fewbit"),
        "target": made.target,
        "recipe": plan.recipe.name,
        "inputs": [described(item) for item in proto.graph.input],
        "outputs": [described(item) for item in proto.graph.output],
        "notes": notes,
        "summary": plan.summary(),
        "operators": made.summary(),
        "difference from fewbit's kernels": made.difference,
        "versions": {"torch": torch.__version__, "onnx opset": proto.opset_import[0].version},
    }
