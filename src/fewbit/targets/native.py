"""fewbit's own checkpoint: a folder that can be read without running anybody's code.

    model.safetensors   every parameter and buffer, quantized or not; its metadata name the tensors that are another's alias
    plan.json           the plan, see fewbit.plan
    report.json         what was measured (optional)
    config.json         for models of transformers: the model's configuration, with a quantization_config

Large models have model-00001-of-00007.safetensors and so on instead, each with the same metadata, and
model.safetensors.index.json, which says where each tensor is (see fewbit.streaming, which writes them).

All files are written beside their place first. Renaming the model (or the index) is the moment a save takes effect: before
it the old checkpoint is whole, after it the new plan is found under its temporary name even if the renaming stops there.
Loading repeats the plan's decisions and takes none of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbit.errors import CheckpointError, PlanError
from fewbit.pipeline import plan_of, skeleton
from fewbit.plan import Plan
from fewbit.source import CONFIG, INDEX, check_index, meta_model, weight_files
from fewbit.source import SINGLE as MODEL
from fewbit.tensorfile import Entry, TensorWriter, mapped, read_header

PLAN, REPORT = "plan.json", "report.json"
SHARDS = "model-*-of-*.safetensors"
PROGRESS = ".progress.json"  # of a checkpoint that is being written file by file
FORMAT = "1"  # of the layout, in the metadata of each file


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, but for the data: each tensor's place, the other names of some, and the plan."""

    folder: Path
    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]
    plan: Plan

    @property
    def file(self) -> Path:
        """The file to name in an error."""
        return self.folder / (MODEL if (self.folder / MODEL).is_file() else INDEX)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, whose memory is the files'."""
        return {name: mapped(entry) for name, entry in self.entries.items()}


def save(model: nn.Module, path: str | Path, report: Mapping[str, Any] | None = None) -> Path:
    """Write a quantized model to the folder ``path``; returns it. An existing checkpoint there is replaced.

    Raises PlanError for a model that fewbit did not quantize, CheckpointError if the folder cannot be written.
    """
    plan = plan_of(model)
    folder = Path(path)
    tensors, aliases = distinct_tensors(model)
    text = plan_text(plan)
    texts = {PLAN: text}
    if report is not None:
        texts[REPORT] = json.dumps(dict(report), indent=1)
    if hasattr(getattr(model, "config", None), "to_diff_dict"):
        hugging_face: Any = model
        dtype = str(hugging_face.dtype).removeprefix("torch.")
        config = {**hugging_face.config.to_diff_dict(), "architectures": [type(model).__name__], "dtype": dtype}
        texts[CONFIG] = config_text(config, plan)
    names = (MODEL, *texts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, content in texts.items():
                next_name(folder, name).write_text(content, encoding="utf-8")
            with TensorWriter(next_name(folder, MODEL), tensors, file_metadata(text, aliases)) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor.cpu())
            for name in names:
                next_name(folder, name).replace(folder / name)
        finally:
            if next_name(folder, MODEL).exists():  # the save did not take effect
                for name in names:
                    next_name(folder, name).unlink(missing_ok=True)
        remove_shards(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}. Give a folder that you may write to.") from error
    return folder


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The quantized model saved in ``path``. ``model``: the float model it came from, or one built alike; it is not
    changed, its numbers are not used, and it may be on meta. None builds it of the folder's config.json by transformers.

    Raises CheckpointError, naming the file and the place, for anything missing, damaged, foreign or not fitting.
    """
    checkpoint = read_checkpoint(path)
    as_configured = model is None
    if model is None:
        model = meta_model(checkpoint.folder)
    try:
        twin = skeleton(model, checkpoint.plan)
    except PlanError as error:
        raise CheckpointError(f"{checkpoint.folder}: does not fit the model given: {error}") from error
    check_fit(twin, checkpoint, as_configured)
    _fill(twin, checkpoint)
    return twin


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The headers and the plan of a folder, checked against each other. CheckpointError as in ``load``."""
    folder = Path(path)
    if not (folder / MODEL).is_file() and not (folder / INDEX).is_file():
        hint = " Its quantization was interrupted: run it again." if (folder / PROGRESS).is_file() else ""
        raise CheckpointError(f"{folder / MODEL}: no such file; a fewbit checkpoint has {MODEL} and {PLAN}.{hint}")
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None
    for file in weight_files(folder):
        found, own = read_header(file)
        if own.get("fewbit") != FORMAT:
            raise CheckpointError(f"{file}: metadata 'fewbit' is {own.get('fewbit')!r}, this fewbit reads {FORMAT!r}.")
        if metadata is not None and own != metadata:
            raise CheckpointError(f"{file}: is of another checkpoint than the files before it; quantize again.")
        metadata = own
        entries.update(found)
    assert metadata is not None
    if not (folder / MODEL).is_file():
        check_index(folder, entries)
    text = _plan_text(folder, metadata.get("plan"))
    try:
        plan = Plan.from_json(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder / PLAN}: not valid JSON: {error}.") from None
    except PlanError as error:
        raise CheckpointError(f"{folder / PLAN}: {error}") from None
    aliases = _aliases(metadata, entries, folder / MODEL)
    return Checkpoint(folder, entries, aliases, plan)


def plan_text(plan: Plan) -> str:
    """plan.json."""
    return json.dumps(plan.to_json(), indent=1)


def config_text(config: Mapping[str, Any], plan: Plan) -> str:
    """config.json of the quantized model: what makes `from_pretrained` hand it to ``fewbit.huggingface``."""
    quantization = {"quant_method": "fewbit", "recipe": plan.recipe.name}
    return json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n"


def file_metadata(plan: str, aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata of each file of tensors; "format" is for other readers of safetensors."""
    return {"format": "pt", "fewbit": FORMAT, "plan": _digest(plan.encode()), "aliases": json.dumps(aliases)}


def remove_shards(folder: Path) -> None:
    """Remove what an earlier, sharded checkpoint left beside the new model."""
    if (folder / INDEX).is_file():
        (folder / INDEX).unlink()
        for file in folder.glob(SHARDS):
            file.unlink()


def slots(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer by name, those of shared modules under each of their names."""
    slots: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                slots[f"{prefix}.{name}" if prefix else name] = (module, name, tensor)
    return slots


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The distinct tensors by their first name, and the other names of each."""
    first: dict[int, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, (_, _, tensor) in slots(model).items():
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


def next_name(folder: Path, name: str) -> Path:
    """Where a file is written before it is renamed."""
    return folder / f".{name}.next"


def _plan_text(folder: Path, digest: str | None) -> str:
    """The plan that belongs to the model: plan.json, or its successor if a save was interrupted."""
    found = False
    for path in (folder / PLAN, next_name(folder, PLAN)):
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


def _aliases(metadata: Mapping[str, str], tensors: Mapping[str, Entry], path: Path) -> dict[str, str]:
    try:
        aliases = json.loads(metadata.get("aliases", ""))
    except json.JSONDecodeError:
        aliases = None
    if not isinstance(aliases, dict) or not all(target in tensors for target in aliases.values()):
        raise CheckpointError(f"{path}: metadata 'aliases' is damaged.")
    return aliases


def check_fit(twin: nn.Module, checkpoint: Checkpoint, as_configured: bool = False) -> None:
    """CheckpointError unless names, shapes and dtypes of the file are those of ``twin``.

    ``as_configured``: float tensors may have another float dtype than the model, which has the configuration's.
    """
    path, places = checkpoint.file, slots(twin)
    present = {*checkpoint.entries, *checkpoint.aliases}
    missing, extra = sorted(places.keys() - present), sorted(present - places.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path}: does not fit the model given: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}."
        )
    for name, (module, key, expected) in places.items():
        found = checkpoint.entries[checkpoint.aliases.get(name, name)]
        floats = as_configured and key in module._parameters and found.dtype.is_floating_point
        if found.shape != expected.shape or (found.dtype != expected.dtype and not floats):
            raise CheckpointError(
                f"{path}: {name}: found {found.dtype} {list(found.shape)}, "
                f"needs {expected.dtype} {list(expected.shape)} to fit the model given."
            )


def _fill(twin: nn.Module, checkpoint: Checkpoint) -> None:
    tensors, aliases = checkpoint.tensors(), checkpoint.aliases
    # One tensor under several names is one object again.
    filled: dict[str, Tensor] = {}
    for name, (module, key, expected) in slots(twin).items():
        source = aliases.get(name, name)
        if key in module._parameters:
            if source not in filled:
                filled[source] = nn.Parameter(tensors[source].to(expected.dtype), requires_grad=expected.requires_grad)
            module._parameters[key] = filled[source]  # type: ignore[assignment]
        else:
            module._buffers[key] = filled.setdefault(source, tensors[source])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def saved_bytes(path: str | Path) -> int:
    """Bytes of the files of tensors in a checkpoint folder."""
    return sum(file.stat().st_size for file in weight_files(Path(path)))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers of a model."""
    distinct = {id(tensor): tensor for _, _, tensor in slots(model).values()}
    return sum(tensor.nbytes for tensor in distinct.values())
