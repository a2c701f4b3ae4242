"""Several processes that share the work of calibration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import streaming
from fewbit.processes import count, gathered, is_first, launched, part, share, summed, united

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(processes: int, *command: str) -> None:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    whole = [*launcher, f"--nproc-per-node={processes}", *command]
    result = subprocess.run(whole, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_process_alone() -> None:
    x = torch.ones(2)
    summed(x)
    assert count() == 1 and gathered(x)[0] is x and x.tolist() == [1, 1]
    assert share([1, 2, 3]) == [1, 2, 3] and part([1, 2, 3]) == [1, 2, 3] and united({"a": 1}) == {"a": 1}
    assert is_first()
    with launched() as group:
        assert group is None


def test_two_processes_find_what_one_finds(
    decoder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder(dtype=torch.float32).save_pretrained(tmp_path / "hf")
    begun = iter(range(20))  # steps of a run of one process, which two go on with
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(streaming, "FILE", 8_000)
        patch.setattr(streaming.Job, "_check_memory", lambda *_: next(begun))
        fewbit.quantize_folder(tmp_path / "hf", tmp_path / "plain-2", "int4-weight-only")
    assert len(list((tmp_path / "plain-2").glob("model-*"))) > 1
    for processes in (1, 2):
        run(processes, str(Path(__file__).parent / "shared_calibration.py"), str(tmp_path))
    files = sorted(path.name.removesuffix("-1.pt") for path in tmp_path.glob("*-1.pt"))
    assert files == ["cnn", "importance", "llama", "tagger"]
    for name in files:
        one, two = (torch.load(tmp_path / f"{name}-{processes}.pt") for processes in (1, 2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    for name in ("plain", "informed", "walked"):
        one, two = (contents(tmp_path / f"{name}-{processes}") for processes in (1, 2))
        assert one == two and len(one) > 5, name


def test_two_processes_of_the_command_line(decoder: Callable[..., Any], tmp_path: Path) -> None:
    decoder(dtype=torch.float32).save_pretrained(tmp_path / "hf")
    fewbit.quantize_folder(tmp_path / "hf", tmp_path / "one", "int4-weight-only")
    command = [str(Path(sys.executable).parent / "fewbit"), "quantize", str(tmp_path / "hf")]
    run(2, "--no-python", *command, "--recipe", "int4-weight-only", "--out", str(tmp_path / "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
