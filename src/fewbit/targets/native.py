"""fewbit's own checkpoint: a folder that can be read without running anybody's code.

    model.safetensors   every parameter and buffer, quantized or not; its metadata name the tensors that are another's alias
    plan.json           the plan, see fewbit.plan
    report.json         what was measured (optional)

All files are written beside their place first. Renaming the model is the moment a save takes effect: before it the old
checkpoint is whole, after it the new plan is found under its temporary name even if the renaming stops there. Loading
repeats the plan's decisions and takes none of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbit.errors import CheckpointError, PlanError
from fewbit.nn import QuantizedLayer
from fewbit.pipeline import plan_of, skeleton
from fewbit.plan import Plan

MODEL, PLAN, REPORT = "model.safetensors", "plan.json", "report.json"
FORMAT = "fewbit-1"


def save(model: nn.Module, path: str | Path, report: Mapping[str, Any] | None = None) -> Path:
    """Write a quantized model to the folder ``path``; returns it. An existing checkpoint there is replaced.

    Raises PlanError for a model that fewbit did not quantize, CheckpointError if the folder cannot be written.
    """
    plan = plan_of(model)
    folder = Path(path)
    tensors, aliases = _tensors(model)
    text = json.dumps(plan.to_json(), indent=1)
    metadata = {"format": FORMAT, "plan": _digest(text.encode()), "aliases": json.dumps(aliases)}
    texts = {PLAN: text} if report is None else {PLAN: text, REPORT: json.dumps(dict(report), indent=1)}
    names = (MODEL, *texts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, content in texts.items():
                _next(folder, name).write_text(content, encoding="utf-8")
            save_file(tensors, _next(folder, MODEL), metadata)
            for name in names:
                _next(folder, name).replace(folder / name)
        finally:
            if _next(folder, MODEL).exists():  # the save did not take effect
                for name in names:
                    _next(folder, name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}. Give a folder that you may write to.") from error
    return folder


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The quantized model saved in ``path``. ``model``: the float model it came from, or one built alike; it is not
    changed, its numbers are not used, and it may be on meta.

    Raises CheckpointError, naming the file and the place, for anything missing, damaged, foreign or not fitting.
    """
    folder = Path(path)
    tensors, metadata = _read_tensors(folder / MODEL)
    text = _plan_text(folder, metadata.get("plan"))
    try:
        plan = Plan.from_json(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder / PLAN}: not valid JSON: {error}.") from None
    except PlanError as error:
        raise CheckpointError(f"{folder / PLAN}: {error}") from None
    aliases = _aliases(metadata, tensors, folder / MODEL)
    try:
        twin = skeleton(model, plan)
    except PlanError as error:
        raise CheckpointError(f"{folder}: does not fit the model given: {error}") from error
    _fill(twin, tensors, aliases, folder / MODEL)
    return twin


def _slots(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer by name, those of shared modules under each of their names."""
    slots: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        derived = module._non_persistent_buffers_set if isinstance(module, QuantizedLayer) else set()
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in derived:
                slots[f"{prefix}.{name}" if prefix else name] = (module, name, tensor)
    return slots


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The distinct tensors by their first name, and the other names of each."""
    first: dict[int, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, (_, _, tensor) in _slots(model).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:  # safetensors takes no two views of one storage
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    return tensors, aliases


def _next(folder: Path, name: str) -> Path:
    """Where a file is written before it is renamed."""
    return folder / f".{name}.next"


def _plan_text(folder: Path, digest: str | None) -> str:
    """The plan that belongs to the model: plan.json, or its successor if a save was interrupted."""
    found = False
    for path in (folder / PLAN, _next(folder, PLAN)):
        if path.is_file():
            found = True
            content = path.read_bytes()
            if _digest(content) == digest:
                try:
                    return content.decode()
                except UnicodeDecodeError as error:
                    raise CheckpointError(f"{path}: not UTF-8 text: {error}.") from None
    if not found:
        raise CheckpointError(f"{folder / PLAN}: no such file; a fewbit checkpoint has {MODEL} and {PLAN}.")
    raise CheckpointError(
        f"{folder / PLAN}: damaged, or not the plan that {MODEL} was saved with; save the model again."
    )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a fewbit checkpoint has {MODEL} and {PLAN}.")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    # safetensors checks the header; what a header that passes can still do wrong surfaces in torch.
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}.") from None
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise CheckpointError(f"{path}: metadata 'format' is {found!r}, this fewbit reads {FORMAT!r}.")
    return tensors, metadata


def _aliases(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    try:
        aliases = json.loads(metadata.get("aliases", ""))
    except json.JSONDecodeError:
        aliases = None
    if not isinstance(aliases, dict) or not all(target in tensors for target in aliases.values()):
        raise CheckpointError(f"{path}: metadata 'aliases' is damaged.")
    return aliases


def _fill(twin: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], path: Path) -> None:
    slots = _slots(twin)
    present = {*tensors, *aliases}
    missing, extra = sorted(slots.keys() - present), sorted(present - slots.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path}: does not fit the model given: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}."
        )
    for name, (_, _, expected) in slots.items():
        found = tensors[aliases.get(name, name)]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise CheckpointError(
                f"{path}: {name}: found {found.dtype} {list(found.shape)}, "
                f"needs {expected.dtype} {list(expected.shape)} to fit the model given."
            )
    # One tensor under several names is one object again.
    filled: dict[str, Tensor] = {}
    for name, (module, key, expected) in slots.items():
        source = aliases.get(name, name)
        if key in module._parameters:
            if source not in filled:
                filled[source] = nn.Parameter(tensors[source], requires_grad=expected.requires_grad)
            module._parameters[key] = filled[source]  # type: ignore[assignment]
        else:
            module._buffers[key] = filled.setdefault(source, tensors[source])
    for module in twin.modules():
        if isinstance(module, QuantizedLayer):
            module._prepare()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def saved_bytes(path: str | Path) -> int:
    """Bytes of the tensors' file in a checkpoint folder."""
    return (Path(path) / MODEL).stat().st_size


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers of a model."""
    distinct = {id(tensor): tensor for _, _, tensor in _slots(model).values()}
    return sum(tensor.nbytes for tensor in distinct.values())
