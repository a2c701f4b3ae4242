"""The command line: each verb on a tiny task, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app, main
from fewbit.ops import native
from fewbit.texts import own_windows, random_windows, read_windows

TASK = """
import torch
from torch import nn
import fewbit


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 256)).eval()
    x = torch.randn(64, 256)
    with torch.no_grad():
        labels = model(x).argmax(1)

    @torch.no_grad()
    def evaluate(candidate):
        return (candidate(x).argmax(1) == labels).float()

    return fewbit.Task(model, calibration=list(x.split(16)), evaluate=evaluate, example_inputs=x[:1])
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return path


def ascii_text(folder: Path) -> Path:
    """A text file that ``write_tokenizer``'s tokenizer can read."""
    path = folder / "text.txt"
    path.write_text((Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().encode("ascii", "ignore").decode())
    return path


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command writes."""
    monkeypatch.setattr(sys, "argv", ["fewbit", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    output = capsys.readouterr()
    assert caught.value.code == 1 and output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("fewbit: ")
    return line


def test_doctor() -> None:
    code, output = invoke("doctor")
    assert code == 0
    assert torch.__version__ in output and fewbit.probe().cpu in output and "accelerator" in output
    assert (native.isa() if native.LOADED else "plain-torch reference") in output


def test_quantize_and_compare_and_report(task: Path, tmp_path: Path) -> None:
    out, figures, page = tmp_path / "out", tmp_path / "figures.json", tmp_path / "report.html"
    code, output = invoke("quantize", task, "--recipe", "int8-dynamic", "--out", out)
    assert code == 0 and "quantized 2 of 2 layers" in output and f"saved to {out}" in output
    loaded = fewbit.load(out, fewbit.load_task(task).model)
    assert fewbit.plan_of(loaded).recipe.name == "int8-dynamic"

    code, output = invoke("compare", task, out, "--max-drop", 0.9, "--out", figures)
    assert code == 0 and "verdict  pass" in output and "SQNR" in output
    assert json.loads(figures.read_text())["recipe"] == "int8-dynamic"

    code, output = invoke("report", figures, "--out", page)
    assert code == 0 and f"wrote {page}" in output and "<!doctype html>" in page.read_text()


def test_quantize_with_exclude_and_a_recipe_file(task: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\n[[rules]]\npattern = "*"\n[rules.scheme]\n'
        'weight = { format = "int8", granularity = { channel = 0 } }\n'
        'input = { format = "uint8", symmetric = false, observer = "minmax" }\n'
    )
    code, output = invoke("quantize", task, "--recipe", recipe, "--out", tmp_path / "out", "--exclude", "2")
    assert code == 0 and "quantized 1 of 2 layers" in output and "excluded by '2'" in output


def test_auto_and_report(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = invoke("auto", task, "--max-drop", 0.9, "--out", out, "--target", "torch")
    assert code == 0 and "verdict: pass" in output and "int8-static" in output
    answer = json.loads((out / "answer.json").read_text())
    assert answer["verdict"] == "pass" and (out / "report.html").is_file()
    assert (
        fewbit.plan_of(fewbit.load(out, fewbit.load_task(task).model)).recipe.name == answer["chosen"].split(" on ")[0]
    )
    for source in (out, out / "answer.json"):
        assert invoke("report", source, "--out", tmp_path / "page.html")[0] == 0


def test_auto_that_does_not_pass_has_exit_code_2(task: Path, tmp_path: Path) -> None:
    code, output = invoke("auto", task, "--max-drop", 0.0, "--out", tmp_path / "out", "--time-limit", 0)
    assert code == 2 and "time limit of 0 s" in output
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "answer.json").read_text())["chosen"] == "float"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    code, output = invoke("quantize", tmp_path / "hf", "--recipe", "int4-weight-only", "--out", tmp_path / "out")
    assert code == 0 and "quantized 9 of 9 layers" in output
    loaded = fewbit.load(tmp_path / "out", LlamaForCausalLM(config))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = fewbit.quantize(model, "int4-weight-only")(tokens).logits
        assert torch.equal(loaded(tokens).logits, expected)


def test_a_text_calibrates_and_judges_a_folder(
    decoder: Callable[..., Any],
    write_tokenizer: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decoder(vocab_size=512, dtype=torch.float32).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    text = ascii_text(tmp_path)
    arguments = ["--recipe", "int4-gptq", "--out", tmp_path / "out", "--text", text]
    code, output = invoke("quantize", tmp_path / "hf", *arguments)
    assert code == 0, output
    expected = fewbit.quantize(
        fewbit.load_task(tmp_path / "hf").model, "int4-gptq", read_windows(tmp_path / "hf", text)
    )
    found = fewbit.load(tmp_path / "out")
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in expected.state_dict().items())
    code, output = invoke("compare", tmp_path / "hf", tmp_path / "out", "--text", text)
    assert code == 0 and "KL" in output
    capsys.readouterr()
    line = failing(monkeypatch, capsys, "compare", tmp_path / "hf", tmp_path / "out")
    assert "compare needs a --text to judge a language model by" in line


@pytest.mark.parametrize("option", ["--random-tokens", "--own-text"])
def test_a_folder_is_calibrated_without_a_text(
    option: str,
    decoder: Callable[..., Any],
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decoder(vocab_size=512, dtype=torch.float32).save_pretrained(tmp_path / "hf")
    arguments = ["--recipe", "int4-weight-only", "--out", tmp_path / "out", option]
    code, output = invoke("quantize", tmp_path / "hf", *arguments)
    assert code == 0, output
    model = fewbit.load_task(tmp_path / "hf").model
    calibration = own_windows(model) if option == "--own-text" else random_windows(tmp_path / "hf")
    expected = fewbit.quantize(model, "int4-weight-only", calibration).state_dict()
    found, without = fewbit.load(tmp_path / "out").state_dict(), fewbit.quantize(model, "int4-weight-only").state_dict()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert not all(torch.equal(x, found[name]) for name, x in without.items())
    capsys.readouterr()
    both = failing(monkeypatch, capsys, "quantize", tmp_path / "hf", *arguments, "--text", task)
    assert f"--text and {option} say what to calibrate with" in both
    assert f"{option} is for a Hugging Face folder" in failing(monkeypatch, capsys, "quantize", task, *arguments)


def test_own_text_needs_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "int4-weight-only", "--out", tmp_path / "out", "--own-text", "--max-ram", "1GB"]
    found = failing(monkeypatch, capsys, "quantize", tmp_path, *arguments)
    assert "--own-text has the float model in memory: leave out --max-ram" in found


def test_bits_and_size_give_sensitive_layers_more(
    decoder: Callable[..., Any],
    write_tokenizer: Callable[[Path], None],
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decoder(vocab_size=512, dtype=torch.float32).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    text = ascii_text(tmp_path)
    arguments = ["quantize", tmp_path / "hf", "--recipe", "int4-symmetric", "--bits", 5.5]
    code, output = invoke(*arguments, "--out", tmp_path / "out", "--text", text)
    assert code == 0, output
    sites = fewbit.plan_of(fewbit.load(tmp_path / "out")).sites.values()
    formats = {site.scheme.weight.format for site in sites if site.type == "Linear"}
    assert "int4" in formats and len(formats) > 1
    capsys.readouterr()
    for extra, message in ((["--max-ram", "1GB", "--text", text], "leave out --max-ram"), ([], "give a --text")):
        assert message in failing(monkeypatch, capsys, *arguments, "--out", tmp_path / "none", *extra)
    task.write_text(TASK.replace("list(x.split(16))", "iter(x.split(16))"))  # read once
    code, output = invoke("quantize", task, "--recipe", "int4-dynamic", "--size", "1MB", "--out", tmp_path / "small")
    assert code == 0, output


def test_help_names_the_verbs() -> None:
    code, output = invoke("--help")
    assert code == 0 and all(verb in output for verb in ("doctor", "quantize", "auto", "compare", "report"))


def test_unknown_recipe_is_one_line(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failing(monkeypatch, capsys, "quantize", task, "--recipe", "int8-dinamic", "--out", tmp_path / "out")
    assert "Did you mean 'int8-dynamic'" in line


def test_missing_and_foreign_files_are_one_line(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text("{}")
    cases = [
        (("quantize", tmp_path / "none.py", "--recipe", "int8-dynamic", "--out", tmp_path), "none.py: no such file"),
        (("compare", task, tmp_path / "none"), "none/model.safetensors: no such file"),
        (("report", tmp_path / "none.json"), "none.json: cannot be read as JSON"),
        (("report", task), "task.py: cannot be read as JSON"),
        (("report", tmp_path / "list.json"), "list.json: found a list"),
        (("report", tmp_path / "other.json"), "not the report of an answer"),
        (("quantize", task, "--recipe", "int8-dynamic", "--out", task / "below"), "cannot be written"),
    ]
    for arguments, message in cases:
        assert message in failing(monkeypatch, capsys, *arguments)


def test_auto_without_evaluate_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "task.py"
    path.write_text("import fewbit\nfrom torch import nn\n\ndef task():\n    return fewbit.Task(nn.Linear(2, 2))\n")
    line = failing(monkeypatch, capsys, "auto", path, "--max-drop", 0.1, "--out", tmp_path / "out")
    assert "auto needs a task with an evaluate function" in line
    checkpoint = fewbit.save(fewbit.quantize(nn.Linear(256, 256), "int8-dynamic"), tmp_path / "saved")
    assert "needs a task with calibration" in failing(monkeypatch, capsys, "compare", path, checkpoint)


def test_errors_in_a_process_have_no_traceback(task: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from fewbit.cli import main; main()"]
    arguments = ["quantize", str(task), "--recipe", "nothing", "--out", str(tmp_path / "out")]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("fewbit: unknown recipe 'nothing'.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def task(:\n", "raised SyntaxError"),
        ("def task():\n    raise OSError('no data')\n", "raised OSError: no data"),
        ("import no_such_module\n", "raised ModuleNotFoundError"),
    ],
    ids=["syntax-error", "raises", "import"],
)
def test_a_task_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "task.py"
    path.write_text(text)
    line = failing(monkeypatch, capsys, "quantize", path, "--recipe", "int8-dynamic", "--out", tmp_path / "out")
    assert f"{path}: {message}" in line


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "config", ["{", "[]", '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'], ids=str
)
def test_a_hugging_face_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    line = failing(monkeypatch, capsys, "quantize", tmp_path, "--recipe", "int8-dynamic", "--out", tmp_path / "out")
    assert str(tmp_path) in line


def test_numbers_and_files_that_cannot_be_used_are_one_line(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, recipe = tmp_path / "file", tmp_path / "latin.toml"
    file.write_text("in the way")
    recipe.write_bytes(b'name = "caf\xe9"')
    cases = [
        (("auto", task, "--max-drop", -1, "--out", tmp_path / "out"), "max_drop: found -1"),
        (("auto", task, "--max-drop", 0.9, "--out", file / "x"), "cannot be made"),
        (("quantize", task, "--recipe", recipe, "--out", tmp_path / "out"), "latin.toml: "),
    ]
    for arguments, message in cases:
        assert message in failing(monkeypatch, capsys, *arguments)


def test_compare_shows_its_figures_even_if_they_cannot_be_written(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    saved = fewbit.save(fewbit.quantize(fewbit.load_task(task).model, "int8-dynamic"), tmp_path / "saved")
    monkeypatch.setattr(
        sys, "argv", ["fewbit", "compare", str(task), str(saved), "--out", str(tmp_path / "file/x.json")]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    output = capsys.readouterr()
    assert caught.value.code == 1 and "SQNR" in output.out
    [line] = output.err.splitlines()
    assert line.startswith("fewbit: ") and "file: cannot be made" in line
