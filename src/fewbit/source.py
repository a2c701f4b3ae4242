"""A Hugging Face folder (config.json and safetensors) as float weights that are read when they are needed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from fewbit.tensorfile import Entry, mapped, read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEXTS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model: as it is in a file (``entry``), or made of several tensors of the files (``make``)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    entry: Entry | None
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """``model`` is on meta, but for buffers that no file has; ``weights`` are by the first of a tensor's names in it."""

    folder: Path
    model: nn.Module
    weights: Mapping[str, Weight]
    unused: tuple[str, ...]

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another: its configuration, and name, size, time and header of each file."""
        config = hashlib.sha256((self.folder / CONFIG).read_bytes()).hexdigest()
        files = {}
        for path in weight_files(self.folder):
            with path.open("rb") as file:
                length = file.read(8)
                header = hashlib.sha256(file.read(int.from_bytes(length, "little"))).hexdigest()
            status = path.stat()
            files[path.name] = [status.st_size, status.st_mtime_ns, header]
        return {"config": config, "files": files}


def open_source(folder: str | Path) -> Source:
    """The model of a folder, checked without reading its data.

    FewbitError, UnsupportedError or CheckpointError, naming the file and the tensor, for a folder that is no model, an
    architecture that transformers does not have, shards that are missing or damaged, and tensors that are missing or do
    not fit the configuration.
    """
    folder = Path(folder)
    config = read_config(folder)
    if "quantization_config" in config:
        method = dict(config["quantization_config"]).get("quant_method")
        raise UnsupportedError(f"{folder / CONFIG}: quantized already ({method}); give the folder of the float model.")
    files = weight_files(folder)
    entries: dict[str, Entry] = {}
    for path in files:
        found, _ = read_header(path)
        for name in found.keys() & entries.keys():
            raise CheckpointError(f"{path}: {name}: is in {entries[name].path.name} too.")
        entries.update(found)
    if not (folder / SINGLE).is_file():
        check_index(folder, entries)
    model = meta_model(folder)
    make_buffers(model)
    weights, unused = _weights(model, entries, folder)
    return Source(folder, model, weights, unused)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is; FewbitError if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise FewbitError(f"{folder}: has no {CONFIG}; give a Hugging Face folder.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise FewbitError(f"{path}: not a Hugging Face configuration: {error}.") from None
    if not isinstance(data, dict):
        raise FewbitError(f"{path}: not a Hugging Face configuration: found a {type(data).__name__}.")
    return data


def copy_texts(folder: Path, out: Path) -> None:
    """Copy what belongs to a model beside its configuration and weights: tokenizer, generation settings, license."""
    for path in sorted(folder.iterdir()):
        ours = path.name in (CONFIG, "plan.json", "report.json") or path.name.endswith(".index.json")
        wanted = path.suffix in TEXTS or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and not ours and not path.name.startswith("."):
            temporary = out / f".{path.name}.next"
            shutil.copyfile(path, temporary)
            temporary.replace(out / path.name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the one, or those that the index names. CheckpointError if one is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder / SINGLE}: no such file, and no {INDEX}; fewbit reads safetensors.")
    files = [folder / name for name in sorted(set(read_index(folder).values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)}: no such file, but {INDEX} names it; copy it again.")
    return files


def read_index(folder: Path) -> dict[str, str]:
    """File names by tensor. CheckpointError if the index is damaged."""
    path = folder / INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(names, dict) or not all(Path(name).name == name for name in names.values()):
            raise ValueError("weight_map must give the name of a file in this folder for each tensor")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error}.") from None
    return names


def check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    """CheckpointError if a tensor is not in the file that the index names for it."""
    for name, file in read_index(folder).items():
        if name not in entries or entries[name].path.name != file:
            raise CheckpointError(f"{folder / INDEX}: {name}: is not in {file}; copy both again.")


def meta_model(folder: Path) -> nn.Module:
    """The float model of config.json on meta, in eval mode and in the configuration's dtype.

    UnsupportedError without transformers, or for an architecture that it does not have.
    """
    names = read_config(folder).get("architectures") or [""]
    try:
        import transformers
    except ImportError:
        raise UnsupportedError(f"{folder}: reading it needs transformers: pip install 'fewbit[hf]'.") from None
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise UnsupportedError(
            f"{folder / CONFIG}: architecture {names[0]!r} is not in transformers {transformers.__version__}; "
            "fewbit runs no code from the folder. Quantize such a model in memory: fewbit.quantize(model, ...)."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"), _default_dtype(getattr(config, "dtype", None) or _first_dtype(folder)):
            model: Any = cls(config)
        if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    # Whatever the class makes of a configuration that is wrong.
    except Exception as error:
        raise UnsupportedError(f"{folder / CONFIG}: transformers cannot build a {names[0]} of it: {error}") from error
    result: nn.Module = model.eval()
    return result


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first_dtype(folder: Path) -> torch.dtype:
    """What transformers takes where the configuration says nothing."""
    for path in weight_files(folder):
        for entry in read_header(path)[0].values():
            if entry.dtype in FLOATS:
                return entry.dtype
    return torch.float32


def make_buffers(model: Any) -> None:
    """Give the buffers of a model of transformers on meta the values that its code computes, as `from_pretrained` does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # nothing is drawn for it
    made: list[tuple[str, Tensor]] = []
    for prefix, module in model.named_modules():
        module._is_hf_initialized = False
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                # A value that no code computes shows what it leaves out.
                unset = float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
                module._buffers[name] = torch.full_like(buffer, unset, device="cpu")
                made.append((f"{prefix}.{name}" if prefix else name, module._buffers[name]))
    model.initialize_weights()
    for name, buffer in made:
        left = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
        if bool(left.any()):
            raise UnsupportedError(f"{type(model).__name__}: transformers gives the buffer {name} no value.")


def _weights(model: nn.Module, entries: Mapping[str, Entry], folder: Path) -> tuple[dict[str, Weight], tuple[str, ...]]:
    """The tensors of the model that are in the files, checked; and the tensors of the files that nothing needs."""
    found, unused = _by_model_name(model, entries)
    weights: dict[str, Weight] = {}
    first: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        other = first.setdefault(id(parameter), name)
        if name in found and other in weights:
            _check_same(weights[other], found[name], f"{folder}: {other} and {name}")
        elif name in found:
            weights[other] = found[name]
    missing = [name for name in dict.fromkeys(first.values()) if name not in weights]
    if missing:
        raise CheckpointError(f"{folder}: no tensor for {', '.join(missing[:3])} ({len(missing)} missing).")
    weights.update({name: found[name] for name, _ in model.named_buffers() if name in found})
    expected = {**parameters, **dict(model.named_buffers())}
    for name, weight in weights.items():
        where = folder if weight.entry is None else weight.entry.path
        if weight.shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: {name}: found {list(weight.shape)}, {CONFIG} makes it {list(expected[name].shape)}."
            )
        if expected[name].is_floating_point() and weight.dtype not in FLOATS:
            allowed = ", ".join(map(str, FLOATS))
            raise CheckpointError(f"{where}: {name}: found {weight.dtype}, needs float weights: {allowed}.")
    return weights, unused


def _check_same(one: Weight, other: Weight, where: str) -> None:
    """The configuration ties two tensors; both may be in the files, but not with different numbers."""
    rows = range(0, one.shape[0] if one.shape else 1, 1024)
    if one.shape != other.shape or not all(
        torch.equal(one.make()[begin : begin + 1024], other.make()[begin : begin + 1024]) for begin in rows
    ):
        raise CheckpointError(f"{where}: tied by {CONFIG}, but not the same; set tie_word_embeddings to false in it.")


def _by_model_name(model: Any, entries: Mapping[str, Entry]) -> tuple[dict[str, Weight], tuple[str, ...]]:
    """The files' tensors by their names in the model, by transformers' own renamings and conversions (merged experts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [part for part in mapping if isinstance(part, WeightRenaming)]
    converters = [part for part in mapping if isinstance(part, WeightConverter)]
    expected = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    found: dict[str, Weight] = {}
    merged: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unused: list[str] = []
    for source in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and source in expected:
            name, pattern = source, None
        if name not in expected:
            unused.append(source)
        elif pattern is None:
            found[name] = _as_it_is(entries[source])
        else:
            converter = next(part for part in converters if pattern in part.source_patterns)
            merged.setdefault(name, (converter, []))[1].append((source, pattern))
    for name, (converter, sources) in merged.items():
        found.update(_converted(model, name, converter, sources, entries, expected))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return found, tuple(name for name in unused if not _is_ignored(name, ignored))


def _is_ignored(name: str, patterns: Any) -> bool:
    known = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", *patterns)
    return any(re.search(pattern, name) is not None for pattern in known)


def _as_it_is(entry: Entry) -> Weight:
    return Weight(entry.dtype, entry.shape, entry, lambda: mapped(entry))


def _converted(
    model: nn.Module,
    name: str,
    converter: Any,
    sources: list[tuple[str, str]],
    entries: Mapping[str, Entry],
    expected: Mapping[str, Tensor],
) -> dict[str, Weight]:
    """The tensors that one conversion of transformers makes."""

    def make(device: str) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)
        for source, pattern in sources:
            entry = entries[source]
            part = mapped(entry) if device == "cpu" else torch.empty(entry.shape, dtype=entry.dtype, device=device)
            own.add_tensor(name, source, pattern, part)
        made = own.convert(name, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def part(key: str) -> Callable[[], Tensor]:
        return lambda: make("cpu")[key]

    try:
        shapes = make("meta")
    # Shards of the wrong shape surface in torch.
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{entries[sources[0][0]].path}: {name}: its parts do not fit together: {error}"
        ) from None
    return {
        key: Weight(value.dtype, tuple(value.shape), None, part(key))
        for key, value in shapes.items()
        if key in expected
    }


def warn_unused(source: Source) -> None:
    """Say which tensors of the files the model does not have: a part of the model may be missing."""
    if source.unused:
        names = ", ".join(source.unused[:3]) + (" and others" if len(source.unused) > 3 else "")
        warnings.warn(
            f"{source.folder}: {len(source.unused)} tensors are in no layer of {type(source.model).__name__} and are left "
            f"out: {names}.",
            stacklevel=3,
        )
