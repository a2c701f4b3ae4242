"""The text of Jane Austen's novels (public domain) from Debian's r-cran-janeaustenr."""

from __future__ import annotations

import zlib
from pathlib import Path


def read_novels(package: Path) -> list[str]:
    """Six novels: Emma, Mansfield Park, Northanger Abbey, Persuasion, Pride and Prejudice, Sense and Sensibility."""
    data = (package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = []
    while data:
        # Each object: its length once decompressed (4 bytes), then a zlib stream.
        stream = zlib.decompressobj()
        novels.append("\n".join(read_strings(stream.decompress(data[4:]))))
        data = stream.unused_data
    return novels


def read_strings(data: bytes) -> list[str]:
    """An R character vector in XDR serialization, version 3."""
    # "X\n", three versions, the length of the encoding's name, that name, the type (16: strings), the count.
    start = 18 + int.from_bytes(data[14:18])
    kind, count = int.from_bytes(data[start : start + 4]), int.from_bytes(data[start + 4 : start + 8])
    if data[:2] != b"X\n" or kind != 16:
        raise ValueError("not a serialized R character vector")
    position = start + 8
    strings = []
    for _ in range(count):
        # Each string: flags (4 bytes), length (4 bytes), UTF-8 bytes.
        length = int.from_bytes(data[position + 4 : position + 8])
        position += 8
        strings.append(data[position : position + length].decode())
        position += length
    return strings
