"""safetensors files a piece at a time, so that no tensor need be in memory as a whole.

A file is the length of its header (8 bytes, little endian), the header in JSON, and the data of all tensors without gaps:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``offset`` in bytes from the beginning of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata; no data are read.

    CheckpointError, naming the file and the tensor, for anything that is missing, cut off or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, LARGEST_HEADER):
                raise CheckpointError(f"{path}: damaged or not a safetensors file: no header in its {size} bytes.")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged or not a safetensors file: its header is no table.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: damaged: its metadata are no table of texts.")
    begin = 8 + length
    entries = {name: _entry(path, name, info, begin) for name, info in header.items()}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path}: {name}: damaged: its data begin at {entry.offset}, not at {end}.")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header says {end}: cut off or damaged; copy it again.")
    return entries, metadata


def _entry(path: Path, name: str, info: Any, begin: int) -> Entry:
    try:
        dtype, shape, (low, high) = DTYPES[info["dtype"]], tuple(info["shape"]), info["data_offsets"]
        entry = Entry(path, dtype, shape, begin + low)
        if (
            any(type(size) is not int or size < 0 for size in (*shape, low, high))
            or low + entry.nbytes != high
            or len(info) != 3
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{path}: {name}: damaged: found {str(info)[:200]}.") from None
    return entry


def mapped(entry: Entry) -> Tensor:
    """A tensor whose memory is the file's: what is read of it is loaded then, and given back with the tensor."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    before = entry.offset - start
    try:
        with entry.path.open("rb") as file:
            # Copy on write: torch has no tensors that cannot be written to.
            memory = mmap.mmap(file.fileno(), before + entry.nbytes, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{entry.path}: cannot be read: {error}.") from None
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=before, count=entry.nbytes)
    if entry.offset % entry.dtype.itemsize:
        data = data.clone()
    return data.view(entry.dtype).view(entry.shape)


class TensorWriter:
    """A new file whose tensors, known by dtype and shape, are written in any order and row by row.

    A context manager: at its end the file is whole and on the disk, unless there was an error. OSError if the file
    cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._entries: dict[str, Entry] = {}
        end = 0
        # The order of the safetensors library; wide numbers first keeps all of them aligned.
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            self._entries[name] = Entry(path, tensor.dtype, tuple(tensor.shape), end)
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end := end + tensor.nbytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin, self._missing = 8 + len(text), end
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._put(len(text).to_bytes(8, "little") + text, 0)
        except OSError:
            os.close(self._file)
            raise

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Some rows (entries along the first axis) of a tensor, from ``row`` on."""
        entry = self._entries[name]
        if tensor.dtype != entry.dtype or tensor.shape[1:] != entry.shape[1:]:
            raise ValueError(
                f"{name}: found {tensor.dtype} {list(tensor.shape)}, needs {entry.dtype} {list(entry.shape)}."
            )
        if not tensor.nbytes:
            return
        data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        begin = entry.offset + row * (entry.nbytes // max(1, entry.shape[0] if entry.shape else 1))
        if begin + tensor.nbytes > entry.offset + entry.nbytes:
            raise ValueError(f"{name}: rows from {row} on reach beyond {list(entry.shape)}.")
        self._put(memoryview(data), self._begin + begin)
        self._missing -= tensor.nbytes

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{self._missing} bytes of the tensors were not written.")
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
