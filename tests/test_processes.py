"""Several processes that share the work of calibration."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import processes, streaming
from fewbit.cli import _part
from fewbit.errors import FewbitError
from fewbit.processes import agree, count, gathered, is_first, launched, part, share, sharing, summed, together, united

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(number: int, *command: str, **environment: str) -> str:
    """Raises what is written to standard error."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    whole = [*launcher, f"--nproc-per-node={number}", str(Path(__file__).parent / command[0]), *command[1:]]
    variables = {**os.environ, **environment}
    result = subprocess.run(whole, capture_output=True, text=True, timeout=300, env=variables)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_process_alone() -> None:
    x = torch.ones(2)
    summed(x)
    assert count() == 1 and gathered(x)[0] is x and x.tolist() == [1, 1]
    assert share([1, 2, 3]) == [1, 2, 3] and part([1, 2, 3]) == [1, 2, 3] and united({"a": 1}) == {"a": 1}
    assert is_first()
    agree(None)
    with pytest.raises(KeyError, match="own"), together():
        raise KeyError("own")
    with launched() as group:
        assert group is None


def test_variables_of_other_launchers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
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
    for number in (1, 2):
        run(number, "shared_calibration.py", str(tmp_path))
    files = sorted(path.name.removesuffix("-1.pt") for path in tmp_path.glob("*-1.pt"))
    assert files == ["cnn", "importance", "llama", "tagger"]
    for name in files:
        one, two = (torch.load(tmp_path / f"{name}-{number}.pt") for number in (1, 2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    for name in ("plain", "informed", "walked"):
        one, two = (contents(tmp_path / f"{name}-{number}") for number in (1, 2))
        assert one == two and len(one) > 5, name


def test_two_processes_of_the_command_line(
    decoder: Callable[..., Any], write_tokenizer: Callable[[Path], None], tmp_path: Path
) -> None:
    decoder(vocab_size=512, dtype=torch.float32).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    words = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().encode("ascii", "ignore").decode()
    text = tmp_path / "text.txt"
    text.write_text(8 * words)
    options = ["--recipe", "int4-gptq", "--text", str(text), "--bits", "5.5"]
    command = ["shared_command.py", "quantize", str(tmp_path / "hf"), *options, "--out"]
    outputs = [run(number, *command, str(tmp_path / f"{number}")) for number in (1, 2)]
    assert all(output.count("saved to") == 1 for output in outputs)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and sum(name.endswith(".safetensors") for name in one) > 2
    with pytest.raises(RuntimeError, match="No space left on device"):
        run(2, *command, str(tmp_path / "3"), FAIL="0", AFTER="25")
    assert 0 < len(list((tmp_path / "3").glob("*.safetensors"))) < len(list((tmp_path / "1").glob("*.safetensors")))
    run(2, *command, str(tmp_path / "3"))
    assert contents(tmp_path / "3") == one


def test_what_fails_in_one_process_ends_all_and_what_is_whole_is_kept(
    decoder: Callable[..., Any], tmp_path: Path
) -> None:
    decoder(dtype=torch.float32).save_pretrained(tmp_path / "hf")
    command = ["shared_command.py", "quantize", str(tmp_path / "hf"), "--recipe", "int4-weight-only", "--out"]
    run(1, *command, str(tmp_path / "1"))
    with pytest.raises(RuntimeError) as error:
        run(2, *command, str(tmp_path / "2"), FAIL="1", AFTER="0")
    assert "No space left on device. What is done is kept" in str(error.value)
    assert "process 1 of 2: OSError: [Errno 28]" in str(error.value)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "2").glob("*.safetensors")}
    assert len(kept) == 1
    run(2, *command, str(tmp_path / "2"))
    assert all((tmp_path / "2" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_parts_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    x = torch.ones(4)
    assert _part(x) is x and _part(None) is None
    with pytest.raises(FewbitError, match="found 2 calibration batches for 3 processes"):
        _part(iter([x, x]))


def test_groups_that_cannot_reach_the_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(FewbitError, match="found backends cuda:nccl, needs one for the CPU"), sharing(object()):
        pass
