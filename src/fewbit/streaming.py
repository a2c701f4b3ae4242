"""A model larger than memory: from a Hugging Face folder to a quantized one, a few rows of a weight at a time.

For each block of layers: read float weights, quantize them, write. Every file of the result is written under a temporary
name and renamed when it is whole on the disk; a record says which are, so that an interrupted run goes on where it was.
The index (or the one file) comes last: without it a folder is no checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, calls, fingerprint
from fewbit.errors import CalibrationError, CheckpointError, PlanError, UnsupportedError
from fewbit.hardware import byte_count, resident
from fewbit.methods import METHODS
from fewbit.nn import QuantizedLayer, layer_class
from fewbit.pipeline import skeleton
from fewbit.placing import Informed
from fewbit.plan import Plan, Recipe, Site, load_recipe, make_plan
from fewbit.processes import agree, count, gathered, is_first, share, sharing, together, united
from fewbit.progress import progress
from fewbit.qtensor import QTensor, by_rows, dequantize, empty, joined, parts, rows
from fewbit.source import CONFIG, INDEX, SINGLE, Source, Weight, copy_texts, open_source, read_config, warn_unused
from fewbit.targets.native import PLAN, PROGRESS, REPORT, config_text, distinct_tensors, file_metadata, next_name
from fewbit.targets.native import plan_text as text_of
from fewbit.tensorfile import TensorWriter, mapped, read_header
from fewbit.transforms import TRANSFORMS

FILE = 2**29  # bytes of a file of tensors: what an interruption may cost
PIECE = 2**22  # weights that are quantized at once if memory allows
WORK = 48  # bytes that quantizing takes for each weight of a piece, measured
FIXED = 96 * 2**20  # bytes that it takes beside, measured: what methods search at once, code that is loaded late


@dataclass(frozen=True)
class Step:
    """What is written at once: one weight of a site as its codes and scales, or (``key`` empty) a tensor as it is."""

    name: str  # of the layer, or of the tensor
    key: str
    tensors: tuple[str, ...]

    @property
    def block(self) -> str:
        """The numbered block that it is in ("model.layers.3"), or its own name."""
        found = re.match(r".*?\.\d+(?=\.)", self.name + ".")
        return found.group() if found else self.name


def quantize_folder(
    source: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe,
    exclude: Iterable[str] = (),
    max_ram: int | str | None = None,
    calibration: Any = None,
    group: Any = None,
) -> Path:
    """Quantize the Hugging Face folder ``source`` to the folder ``out`` without loading the model; returns ``out``.

    ``out`` is read by ``fewbit.load(out)``, and by transformers' ``from_pretrained`` once fewbit is imported.
    ``recipe``, ``exclude``, ``calibration``: as for ``quantize``; batches and what layers make of them stay in memory.
    ``max_ram``: the most memory that each process may take, in bytes or as "6GB". A run that was interrupted goes on when it
    is called again, with the same data.

    ``group``: processes of torch.distributed that share the work, as for ``quantize``: each calls this with the same arguments
    and its own part of the calibration batches. Each makes files of its own; where a method goes from block to block, each
    finds the weights of some layers and the first process writes them all. The files are those that one process makes, with
    data up to the order of their sums; an interrupted run may go on with another number of processes. The group needs a backend
    for the CPU. What fails in one process raises in all, but within such a walk: end them all then, as torchrun does.

    Raises FewbitError, UnsupportedError or CheckpointError for a source that cannot be read (see ``open_source``),
    PlanError for a recipe that does not fit, CheckpointError if ``out`` cannot be written or holds something else,
    CalibrationError (data), UnsupportedError for a recipe with static ranges, or if ``max_ram`` is too little.
    """
    with sharing(group):
        return _quantize_folder(source, out, load_recipe(recipe, exclude), max_ram, calibration)


def _quantize_folder(
    source: str | Path, out: str | Path, recipe: Recipe, max_ram: int | str | None, calibration: Any
) -> Path:
    with together():
        job = _job(source, out, recipe, max_ram, calibration)
    data = gathered([fingerprint(call) for call in job.batches])
    if any(data) and not all(data):
        raise CalibrationError(
            f"process {data.index([])} has no calibration batch, others do: each needs one at least."
        )
    job = replace(job, data=tuple(itertools.chain.from_iterable(data)))
    if len(set(gathered(job.identity))) > 1:
        raise PlanError(f"{out}: the processes that share it have different sources or recipes.")
    with together():
        job.folder_is_free()
    try:
        job.run()
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written: {error}. What is done is kept: call again to go on."
        ) from error
    return job.out


def _job(source: str | Path, out: str | Path, recipe: Recipe, max_ram: int | str | None, calibration: Any) -> Job:
    limit = None if max_ram is None else byte_count(max_ram)
    opened = open_source(source)
    plan = _plan(opened.model, recipe)
    layout = skeleton(opened.model, plan)
    tensors, aliases = distinct_tensors(layout)
    tensors = _with_dtypes(tensors, opened)
    steps = _steps(plan, tensors)
    at_once = {
        (step.name, step.key): _rows_at_once(step, plan.sites[step.name], opened, limit) for step in steps if step.key
    }
    batches = () if calibration is None else tuple(calls(opened.model, calibration))
    metadata = file_metadata(text_of(plan), aliases)
    warn_unused(opened)
    return Job(Path(out), opened, plan, layout, tensors, metadata, limit, at_once, _files(steps, tensors), batches)


@dataclass(frozen=True)
class Job:
    """Everything that a run needs: where from, where to, what is to be written and how much of it at once."""

    out: Path
    source: Source
    plan: Plan
    layout: nn.Module  # the quantized model on meta
    tensors: Mapping[str, Tensor]  # on meta, in the dtypes of the result
    metadata: Mapping[str, str]
    limit: int | None
    at_once: Mapping[tuple[str, str], int]  # rows of a weight
    files: list[list[Step]]
    batches: tuple[Call, ...]  # to calibrate with, of this process
    data: tuple[str, ...] = ()  # what identifies the batches of all processes

    @property
    def identity(self) -> str:
        """Equal for two runs that must give the same files."""
        facts = {"source": self.source.fingerprint(), "metadata": dict(self.metadata), "file": FILE}
        if self.data:
            facts["data"] = self.data
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def folder_is_free(self) -> None:
        """CheckpointError if the folder has another checkpoint, or an unfinished one of another source or recipe."""
        if self.out.resolve() == self.source.folder.resolve():
            raise CheckpointError(f"{self.out}: is the source; give another folder.")
        for name in (SINGLE, INDEX):
            if (self.out / name).exists():
                raise CheckpointError(f"{self.out}: has a {name} already; give a new folder, or delete it.")
        record = self._record()
        if record and record["job"] != self.identity:
            raise CheckpointError(
                f"{self.out}: has an unfinished quantization of another source or recipe; delete the folder or give a new one."
            )

    def run(self) -> None:
        names = _file_names(len(self.files))
        self.out.mkdir(parents=True, exist_ok=True)
        record = gathered(self._record())[0] or {"job": self.identity, "files": {}}
        done: dict[str, dict[str, float]] = record["files"]
        todo = [(name, steps) for name, steps in zip(names, self.files, strict=True) if name not in done]
        informed = None
        if self.batches and todo:
            places = {
                key: name
                for name, steps in zip(names, self.files, strict=True)
                if name in done
                for s in steps
                for key in s.tensors
            }
            written = partial(self._written, places)
            informed = Informed(self.source, self.plan, self.batches, self._whole, written)
        in_order = informed is not None and informed.in_order
        mine = todo if in_order else share(todo)
        block, error = "", math.nan

        def status() -> str:
            return f"quantizing {block}, weight error {100 * error:.1f} %"

        every = progress([(name, step) for name, steps in mine for step in steps], "quantizing", status)
        for turn in range(len(todo) if in_order else math.ceil(len(todo) / count())):
            made: dict[str, dict[str, float]] = {}
            failure: Exception | None = None
            try:
                for name, steps in mine[turn : turn + 1]:
                    errors: dict[str, float] = {}
                    with self._writer(name, steps, is_first() or not in_order) as writer:
                        for _ in steps:
                            _, step = next(every)
                            block = step.block
                            if step.key:
                                error = errors[f"{step.name}.{step.key}"] = self._quantize(step, writer, informed)
                            elif writer is not None:
                                self._copy(step, writer)
                            self._check_memory(step)
                    if writer is not None:
                        made[name] = errors
            except Exception as caught:
                if in_order:  # the others are at other exchanges
                    raise
                failure = caught
            done.update(united(made))
            if is_first() and len(names) > 1:
                self._write(PROGRESS, json.dumps(record))
            agree(failure)
        next(every, None)  # the bar is done
        with together():
            if is_first():
                self._finish(names, {key: value for errors in done.values() for key, value in errors.items()})

    @contextlib.contextmanager
    def _writer(self, name: str, steps: list[Step], wanted: bool) -> Iterator[TensorWriter | None]:
        """For a file, which gets its name when it is whole (the only one in ``_finish``); None if it is not wanted."""
        if not wanted:
            yield None
            return
        temporary = next_name(self.out, name)
        tensors = {key: self.tensors[key] for step in steps for key in step.tensors}
        try:
            with TensorWriter(temporary, tensors, self.metadata) as writer:
                yield writer
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if name != SINGLE:
            temporary.replace(self.out / name)

    def _quantize(self, step: Step, writer: TensorWriter | None, informed: Informed | None) -> float:
        """Quantize one weight, and write it where there is a writer; returns ``|W - quantized W| / |W|``."""
        found = None if informed is None else informed.take(step.name, step.key)
        if writer is None:
            return math.nan
        importance = None if informed is None else informed.importance(step.name, step.key)
        squares = torch.zeros(2, dtype=torch.float64)
        for begin, piece in self._pieces(step.name, step.key):
            if found is None:
                quantized = self._quantized(step.name, step.key, begin, piece, importance)
            else:
                quantized = rows(found, slice(begin, begin + len(piece)))
            for name, part in parts(quantized, step.key).items():
                writer.write(f"{step.name}.{name}", part, begin)
            squares += _squares(piece, quantized)
        # Rounded, since the last digits depend on the pieces.
        return float(f"{float((squares[0] / squares[1]).sqrt()):.4g}") if squares[1] else 0.0

    def _whole(self, name: str, key: str, importance: Tensor | None) -> QTensor:
        pieces = self._pieces(name, key)
        return joined([self._quantized(name, key, begin, piece, importance) for begin, piece in pieces])

    def _pieces(self, name: str, key: str) -> Iterator[tuple[int, Tensor]]:
        """The float32 weight matrix, some rows at once, and the number of their first."""
        weight, module = self._weight(f"{name}.{key}"), self.source.model.get_submodule(name)
        whole = weight.make() if weight.entry is None else None
        at_once = self.at_once[(name, key)]
        for begin in range(0, self.plan.sites[name].weights[key][0], at_once):
            matrix = _matrix(module, key, weight.make() if whole is None else whole)
            piece = matrix[begin : begin + at_once].to(torch.float32, copy=True)
            del matrix  # and with it the file's pages
            yield begin, piece

    def _quantized(self, name: str, key: str, begin: int, piece: Tensor, importance: Tensor | None) -> QTensor:
        site, module = self.plan.sites[name], self.source.model.get_submodule(name)
        if importance is not None and importance.dim() > 1 and len(importance) > 1:
            importance = importance[begin : begin + len(piece)]
        method, pairs = METHODS[site.scheme.method], layer_class(module).pairs(module)
        try:
            return method.quantize(piece, site.scheme.weight, importance, pairs)
        except ValueError as error:
            raise PlanError(f"{name}.{key}: cannot be quantized: {error}") from None

    def _written(self, places: Mapping[str, str], name: str, key: str) -> QTensor | None:
        """A weight that is in a file of the result: ``places`` are the files by tensor."""
        layer = copy.copy(self.layout.get_submodule(name))
        assert isinstance(layer, QuantizedLayer)
        names = {own: f"{name}.{own}" for own in parts(layer.qtensor(key), key)}
        if not all(full in places for full in names.values()):
            return None
        entries = {own: read_header(self.out / places[full])[0][full] for own, full in names.items()}
        layer._buffers = {**layer._buffers, **{own: mapped(entry) for own, entry in entries.items()}}
        return layer.qtensor(key)

    def _copy(self, step: Step, writer: TensorWriter) -> None:
        """A tensor that stays as it is, or a buffer that is in no file."""
        weight = self.source.weights.get(step.name)
        if weight is None:
            writer.write(step.name, self.source.model.get_buffer(step.name))
            return
        at_once = max(1, 4 * PIECE // max(1, math.prod(weight.shape[1:])))
        whole = weight.make() if weight.entry is None or not weight.shape else None
        for begin in range(0, weight.shape[0] if weight.shape else 1, at_once):
            part = (weight.make() if whole is None else whole)[begin : begin + at_once] if weight.shape else whole
            assert part is not None
            writer.write(step.name, part, begin)

    def _weight(self, name: str) -> Weight:
        """The float weight of this name, which may be tied to the one that is in the files."""
        if name in self.source.weights:
            return self.source.weights[name]
        tie = next(tie for tie in self.plan.ties if name in tie)
        return next(self.source.weights[other] for other in tie if other in self.source.weights)

    def _check_memory(self, step: Step) -> None:
        taken = resident()
        if self.limit is not None and taken > self.limit:
            raise UnsupportedError(
                f"{step.name}: the process takes {taken / 1e6:.0f} MB, max_ram is {self.limit / 1e6:.0f} MB. "
                "What is done is kept: call again with more."
            )

    def _record(self) -> dict[str, Any] | None:
        path = self.out / PROGRESS
        if not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record["job"], str) or not all((self.out / name).is_file() for name in record["files"]):
                raise ValueError("it names files that are not there")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}; delete the folder {self.out}.") from None
        return record

    def _finish(self, names: list[str], errors: Mapping[str, float]) -> None:
        copy_texts(self.source.folder, self.out)
        config = read_config(self.source.folder)
        if "dtype" not in config and "torch_dtype" not in config:
            first = next(weight.dtype for weight in self.source.weights.values() if weight.dtype.is_floating_point)
            config["dtype"] = str(first).removeprefix("torch.")
        self._write(CONFIG, config_text(config, self.plan))
        self._write(PLAN, text_of(self.plan))
        self._write(REPORT, json.dumps({"weight_errors": dict(sorted(errors.items()))}, indent=1))
        if len(names) == 1:
            next_name(self.out, SINGLE).replace(self.out / SINGLE)
        else:
            places = {
                key: name for name, steps in zip(names, self.files, strict=True) for s in steps for key in s.tensors
            }
            size = sum(self.tensors[key].nbytes for key in places)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            self._write(INDEX, json.dumps(index, indent=2))
        (self.out / PROGRESS).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        path = next_name(self.out, name)
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        path.replace(self.out / name)


def _plan(model: nn.Module, recipe: Recipe) -> Plan:
    if recipe.needs_calibration:
        raise UnsupportedError(
            f"recipe {recipe.name!r} fixes input ranges, which quantize_folder does not: "
            "take a recipe with dynamic or float inputs, or load the model and use fewbit.quantize."
        )
    unread: dict[str, str] = {}
    for name in recipe.transforms:
        if TRANSFORMS[name].needs_graph:
            unread[f"transform {name}"] = "it needs a calibration batch"
        elif TRANSFORMS[name].find(model, None):
            raise UnsupportedError(f"transform {name!r} changes this {type(model).__name__}: use fewbit.quantize.")
    plan = make_plan(model, recipe)
    return replace(plan, skipped={**plan.skipped, **unread})


def _with_dtypes(tensors: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """What stays float in the dtype of the source."""
    weights = source.weights
    return {
        name: torch.empty(tensor.shape, dtype=weights[name].dtype if name in weights else tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def _steps(plan: Plan, tensors: Mapping[str, Tensor]) -> list[Step]:
    """Everything to be written, in the order of the layers."""
    owners = {}
    for name, site in plan.sites.items():
        for key in site.weights:
            owners.update(
                {f"{name}.{part}": (name, key) for part in parts(empty(site.weights[key], site.scheme.weight), key)}
            )
    steps: dict[tuple[str, str], list[str]] = {}
    for name in tensors:
        steps.setdefault(owners.get(name, (name, "")), []).append(name)
    return [Step(name, key, tuple(names)) for (name, key), names in steps.items()]


def _files(steps: list[Step], tensors: Mapping[str, Tensor]) -> list[list[Step]]:
    """The steps of each file, of about FILE bytes."""
    files: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        own = sum(tensors[name].nbytes for name in step.tensors)
        if files[-1] and size + own > FILE:
            files.append([])
            size = 0
        files[-1].append(step)
        size += own
    return files


def _file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]


def _rows_at_once(step: Step, site: Site, source: Source, limit: int | None) -> int:
    """How many rows of a weight are quantized at once; UnsupportedError if ``limit`` leaves no room for it."""
    rows, columns = site.weights[step.key]
    most = max(1, min(rows, PIECE // max(1, columns)))
    least = 1 if by_rows(site.scheme.weight) else rows
    if limit is None:
        return max(most, least)
    taken = resident()
    room = limit - taken - FIXED
    if room < least * columns * WORK:
        needed = taken + FIXED + least * columns * WORK
        raise UnsupportedError(
            f"{step.name}.{step.key}: max_ram is {limit / 1e6:.0f} MB, of which the process takes {taken / 1e6:.0f} MB "
            f"already; {least} of its {rows} rows need {needed / 1e6:.0f} MB. Give at least that."
        )
    return max(least, min(most, room // (columns * WORK)))


def _matrix(module: nn.Module, key: str, weight: Tensor) -> Tensor:
    """The weight as ``[rows, columns]``, by the layer type that knows how: a view of ``weight``."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, key: nn.Parameter(weight, requires_grad=False)}
    return layer_class(module).matrices(twin)[key]


def _squares(weight: Tensor, quantized: QTensor) -> Tensor:
    """Sums of squares of the error and of the weight."""
    error = dequantize(quantized).sub_(weight)
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in (error, weight)])
