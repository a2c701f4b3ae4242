"""Several processes that share the work of calibration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fewbit.processes import count, gathered, share, summed, united


def test_a_process_alone() -> None:
    x = torch.ones(2)
    summed(x)
    assert count() == 1 and gathered(x)[0] is x and x.tolist() == [1, 1]
    assert share([1, 2, 3]) == [1, 2, 3] and united({"a": 1}) == {"a": 1}


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    script = Path(__file__).parent / "shared_calibration.py"
    for processes in (1, 2):
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        result = subprocess.run(
            [*command, "--standalone", str(script), str(tmp_path)], capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-2000:]
    files = sorted(path.name.removesuffix("-1.pt") for path in tmp_path.glob("*-1.pt"))
    assert files == ["cnn", "importance", "llama", "tagger"]
    for name in files:
        one, two = (torch.load(tmp_path / f"{name}-{processes}.pt") for processes in (1, 2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
