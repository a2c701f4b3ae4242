"""safetensors files a piece at a time: the same bytes as the library's, and clear about damage."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbit import CheckpointError
from fewbit.tensorfile import NAMES, TensorWriter, mapped, read_header

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text("abc.é_1", min_size=1, max_size=6), max_size=5, unique=True))
    made = {}
    for number, name in enumerate(names):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        generator = torch.Generator().manual_seed(number)
        made[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return made


def written(path: Path, data: dict[str, Tensor], chance: random.Random) -> Path:
    """The file, written in random pieces in random order."""
    pieces = []
    for name, tensor in data.items():
        rows = tensor.shape[0] if tensor.dim() else 1
        cuts = sorted({0, rows, *(chance.randrange(rows + 1) for _ in range(2))})
        pieces += [(name, begin, end) for begin, end in itertools.pairwise(cuts)]
    chance.shuffle(pieces)
    with TensorWriter(path, {name: tensor.to("meta") for name, tensor in data.items()}, {"format": "pt"}) as writer:
        for name, begin, end in pieces:
            writer.write(name, data[name][begin:end] if data[name].dim() else data[name], begin)
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=tensors(), seed=st.integers(0, 5))
def test_what_is_written_is_what_the_library_reads_and_writes(
    data: dict[str, Tensor], seed: int, tmp_path: Path
) -> None:
    ours = written(tmp_path / "ours.safetensors", data, random.Random(seed))
    save_file(data, tmp_path / "theirs.safetensors", {"format": "pt"})
    read = load_file(ours)
    assert read.keys() == data.keys() and all(torch.equal(read[name], data[name]) for name in data)
    for path in (ours, tmp_path / "theirs.safetensors"):
        entries, metadata = read_header(path)
        assert metadata == {"format": "pt"} and entries.keys() == data.keys()
        for name, entry in entries.items():
            found = mapped(entry)
            assert found.dtype == data[name].dtype and torch.equal(found, data[name])


def test_a_mapped_tensor_can_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", {"x": torch.zeros(3000)}, random.Random(0))
    before = path.read_bytes()
    mapped(read_header(path)[0]["x"]).fill_(1)
    assert path.read_bytes() == before


def test_data_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x07" + struct.pack("<f", 1.5))
    assert mapped(read_header(path)[0]["b"]).item() == 1.5


def test_a_file_is_only_whole_if_everything_was_written(tmp_path: Path) -> None:
    x = torch.zeros(4, 2)
    with (
        pytest.raises(ValueError, match="16 bytes of the tensors were not written"),
        TensorWriter(tmp_path / "x", {"x": x}, {}) as writer,
    ):
        writer.write("x", x[:2])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        read_header(tmp_path / "x")
    for wrong, row in ((x.half(), 0), (x[:, :1], 0), (x, 1)):
        with pytest.raises(ValueError, match=r"^x: "), TensorWriter(tmp_path / "x", {"x": x}, {}) as writer:
            writer.write("x", wrong, row)


def test_all_dtypes_have_a_name() -> None:
    assert all(dtype in NAMES for dtype in DTYPES)


def test_damage_raises_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    chance = random.Random(0)
    good = written(tmp_path / "x", {"a": torch.ones(3, 2), "b": torch.ones(5).byte()}, chance).read_bytes()
    begin = 8 + struct.unpack("<Q", good[:8])[0]
    for turn in range(400):
        content, place = bytearray(good), chance.randrange(len(good))
        if turn % 3 == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif turn % 3 == 1:
            del content[place:]
        else:
            content[place:place] = chance.randbytes(chance.randrange(1, 9))
        (tmp_path / "x").write_bytes(content)
        try:
            for entry in read_header(tmp_path / "x")[0].values():
                mapped(entry)
        except CheckpointError:
            continue
        assert turn % 3 == 0 and (place >= begin or chr(good[place]) not in '{}[]:"')


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a":1}',
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[100000000000000000000],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"a":1}}',
        b"[" * 100_000,
    ],
)
def test_headers_that_contradict_themselves(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="/x: "):
        read_header(tmp_path / "x")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no header in its 0 bytes"):
        read_header(tmp_path / "x")
