"""The verbs as subcommands. No logic: each calls the function of the same name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fewbit
from fewbit import processes
from fewbit.errors import EvaluationError, FewbitError
from fewbit.generation import complete
from fewbit.ops import native
from fewbit.report import make_folder, write_report, write_text
from fewbit.search.answer import FLOAT
from fewbit.targets import read_checkpoint, saved_bytes
from fewbit.texts import own_windows, random_windows, read_windows, text_task

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=fewbit.__doc__)
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 140  # a file has no width that tables must fit

Source = Annotated[Path, typer.Argument(metavar="TASK", help="a task.py, or a Hugging Face folder")]
Exclude = Annotated[list[str] | None, typer.Option(help="pattern of layers to leave in float; may be repeated")]
MaxDrop = Annotated[float, typer.Option(help="the most that may be lost, in the units of the score")]
Confidence = Annotated[float, typer.Option(help="with which it is to be shown, one-sided")]


@app.command()
def doctor() -> None:
    """What this machine is: CPU features, kernels, cores, memory, versions, extras."""
    machine = fewbit.probe()
    table = Table(show_header=False, box=None)
    table.add_row("CPU", machine.cpu)
    table.add_row("features", ", ".join(machine.features) or "none that quantized kernels use")
    table.add_row("cores", f"{machine.cores}, {machine.threads} threads used by torch")
    table.add_row("memory", f"{machine.memory / 2**30:.1f} GiB")
    table.add_row("accelerator", machine.accelerator)
    kernels = native.isa() if native.LOADED else "plain-torch reference: exact, usually slower than float"
    table.add_row("kernels", kernels)
    table.add_row("system", machine.system)
    for name, version in machine.versions.items():
        table.add_row(name, version)
    console.print(table)


@app.command()
def quantize(
    source: Source,
    recipe: Annotated[str, typer.Option(help=f"one of {', '.join(fewbit.presets())}, or a .toml file")],
    out: Annotated[Path, typer.Option(help="folder for the quantized model")],
    exclude: Exclude = None,
    max_ram: Annotated[str | None, typer.Option(help='for a folder: the most memory to take, like "6GB"')] = None,
    text: Annotated[Path | None, typer.Option(help="for a folder: a text file to calibrate with")] = None,
    random_tokens: Annotated[
        bool, typer.Option("--random-tokens", help="for a folder: calibrate with tokens drawn at random")
    ] = False,
    own_text: Annotated[
        bool,
        typer.Option(
            "--own-text", help="for a folder: calibrate with what the model writes, which has to fit in memory"
        ),
    ] = False,
    bits: Annotated[float | None, typer.Option(help="of a weight on average: sensitive layers get more")] = None,
    size: Annotated[str | None, typer.Option(help='of the model, like "3.5GB": sensitive layers get more bits')] = None,
) -> None:
    """Quantize a model and save it; a Hugging Face folder piece by piece, in little memory.

    Several processes share the work: OMP_NUM_THREADS=4 torchrun --standalone --nproc-per-node=2 --no-python fewbit quantize ...
    (4: threads of each; torchrun's default is 1).
    """
    chosen = fewbit.load_recipe(recipe, exclude or ())
    mixed = bits is not None or size is not None
    data = {"--text": text is not None, "--own-text": own_text, "--random-tokens": random_tokens}
    of_folder = {"--max-ram": max_ram is not None, **data}
    if given := [name for name, is_given in of_folder.items() if is_given and source.is_file()]:
        raise FewbitError(f"{source}: {given[0]} is for a Hugging Face folder; a task.py gives its own data.")
    if len(given := [name for name, is_given in data.items() if is_given]) > 1:
        raise FewbitError(f"{' and '.join(given)} say what to calibrate with: take one of them.")
    if source.is_dir() and mixed and text is None and not own_text:
        raise FewbitError(
            f"{source}: --bits and --size measure which layers are sensitive: give a --text, or take --own-text."
        )
    if own_text and max_ram is not None:
        raise FewbitError("--own-text has the float model in memory: leave out --max-ram, or take --random-tokens.")
    if source.is_dir() and mixed and max_ram is not None:
        raise FewbitError("--bits and --size have the float model and its gradients in memory: leave out --max-ram.")
    with processes.launched() as group, processes.sharing(group):
        if source.is_dir():
            calibration = None
            if text is not None:
                calibration = read_windows(source, text)
            elif random_tokens:
                calibration = random_windows(source)
            elif own_text:
                with processes.together():
                    written = own_windows(fewbit.load_task(source).model) if processes.is_first() else None
                calibration = processes.gathered(written)[0]
            if mixed:
                # The model is dropped: quantizing reads the folder piece by piece.
                chosen = fewbit.mixed_precision(
                    fewbit.load_task(source).model, chosen, calibration, bits=bits, size=size
                )
            chosen = processes.gathered(chosen)[0]
            folder = fewbit.quantize_folder(source, out, chosen, (), max_ram, _part(calibration), group)
            plan = read_checkpoint(folder).plan
        else:
            task = fewbit.load_task(source)
            calibration = task.calibration
            if mixed:
                if isinstance(calibration, Iterator):
                    calibration = list(calibration)  # it is read twice
                chosen = fewbit.mixed_precision(task.model, chosen, calibration, bits=bits, size=size)
            chosen = processes.gathered(chosen)[0]
            quantized, folder = fewbit.quantize(task.model, chosen, _part(calibration), group=group), out
            plan = fewbit.plan_of(quantized)
            if processes.is_first():
                fewbit.save(quantized, out)
        if processes.is_first():
            console.print(plan.summary())
            console.print(f"saved to {folder}: {saved_bytes(folder) / 1e6:.2f} MB")


def _part(batches: Any) -> Any:
    """This process' part of the calibration batches; one that is no list of batches is left to who reads it."""
    if processes.count() == 1 or batches is None or isinstance(batches, (Tensor, Mapping)):
        return batches
    every = list(batches)
    if len(every) < processes.count():
        raise FewbitError(
            f"found {len(every)} calibration batches for {processes.count()} processes: each needs one at least; "
            "start fewer processes or give more data."
        )
    return processes.part(every)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="a language model that `fewbit quantize` wrote")],
    prompt: Annotated[str, typer.Argument(help="the text to go on with")],
    tokens: Annotated[int, typer.Option(help="how many tokens to add")] = 64,
) -> None:
    """Continue a text, greedily, with a quantized language model."""
    console.print(complete(folder, prompt, tokens), markup=False)


@app.command()
def auto(
    source: Source,
    max_drop: MaxDrop,
    out: Annotated[Path, typer.Option(help="folder for the model, answer.json and report.html")],
    confidence: Confidence = 0.95,
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no further recipe is tried")] = None,
    target: Annotated[list[str] | None, typer.Option(help="engine to measure; may be repeated; default: all")] = None,
) -> None:
    """Find the fastest quantized model within the budget; exit code 0 if there is one, 2 if not."""
    task = fewbit.load_task(source)
    if task.evaluate is None:
        raise EvaluationError(f"{source}: auto needs a task with an evaluate function.")
    make_folder(out)  # before the search: its result must not be lost
    answer = fewbit.autoquantize(
        task.model,
        calibration=task.calibration,
        evaluate=task.evaluate,
        budget=fewbit.Budget(max_drop, confidence),
        example_inputs=task.example_inputs,
        time_limit=time_limit,
        targets=target or None,
    )
    answer.save(out)
    write_text(out / "answer.json", json.dumps(answer.to_json(), indent=1))
    report = answer.report(out / "report.html")
    console.print(_trials_table(answer))
    console.print(answer.explain())
    console.print(f"report: {report}" + ("" if answer.chosen.recipe == FLOAT else f"; model: {out}"))
    raise typer.Exit(0 if answer.verdict == "pass" else 2)


@app.command()
def compare(
    source: Source,
    checkpoint: Annotated[Path, typer.Argument(help="folder of a model that fewbit saved from this task")],
    max_drop: Annotated[float | None, typer.Option(help="judge the drop against this budget")] = None,
    out: Annotated[Path | None, typer.Option(help="write the figures to this JSON file")] = None,
    text: Annotated[Path | None, typer.Option(help="of a language model's folder: a text file to judge by")] = None,
) -> None:
    """Measure a saved quantized model beside its float one."""
    if text is None and source.is_dir():
        raise FewbitError(f"{source}: compare needs a --text to judge a language model by.")
    task = fewbit.load_task(source) if text is None else text_task(source, text)
    batches = [task.example_inputs] if task.calibration is None else task.calibration
    if batches == [None]:
        raise FewbitError(f"{source}: compare needs a task with calibration batches or example_inputs.")
    quantized = fewbit.load(checkpoint, task.model)
    budget = None if max_drop is None else fewbit.Budget(max_drop)
    comparison = fewbit.compare(task.model, quantized, batches, task.evaluate, budget)
    console.print(str(comparison))
    if out is not None:
        data = {**comparison.to_json(), "text": str(comparison)}
        write_text(out, json.dumps(data, indent=1))


@app.command()
def export(
    source: Source,
    out: Annotated[
        Path, typer.Option(help="the .onnx file (a .json file beside it says what it is), or what FORMAT is")
    ],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="folder of a model that fewbit saved from this task")
    ] = None,
    target: Annotated[str, typer.Option(help="onnxruntime or openvino")] = "onnxruntime",
    format: Annotated[str | None, typer.Option(help="of a language model: compressed-tensors or gguf")] = None,
    notes: Annotated[str, typer.Option(help="how inputs are to be prepared, say")] = "",
) -> None:
    """Write a saved static int8 model for another engine, checked there; or, with FORMAT, the folder of a language model."""
    if format is not None:
        console.print(f"wrote {fewbit.export_folder(source, out, format)}")
        return
    if checkpoint is None:
        raise FewbitError(
            f"{source}: export needs the folder of the saved model too, or --format for a language model."
        )
    task = fewbit.load_task(source)
    if task.example_inputs is None:
        raise FewbitError(f"{source}: export needs a task with example_inputs.")
    quantized = fewbit.load(checkpoint, task.model)
    path = fewbit.export(quantized, out, target, example_inputs=task.example_inputs, notes=notes)
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    console.print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; {card['operators']}")


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="a JSON file of compare or auto, or a folder with report.json")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
) -> None:
    """Render measured figures as one HTML file."""
    file = source / "report.json" if source.is_dir() else source
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FewbitError(f"{file}: cannot be read as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise FewbitError(f"{file}: found a {type(data).__name__}, needs the report of auto or compare.")
    console.print(f"wrote {write_report(data, out)}")


def _trials_table(answer: fewbit.Answer) -> Table:
    table = Table("recipe", "score", "drop", "95 % interval", "latency ms", "size MB", "verdict")
    for trial in answer.trials:
        row: list[Any] = [trial.recipe]
        if trial.problem is not None or trial.scores is None or trial.latency is None or trial.size is None:
            table.add_row(trial.recipe, *[""] * 5, "not tried")
            continue
        interval = trial.scores.interval() if trial.verdict is not None else None
        row += [f"{trial.scores.quantized_score:.4g}", "" if trial.verdict is None else f"{trial.scores.drop:.4g}"]
        row += ["" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"]
        row += [f"{trial.latency.median:.2f}", f"{trial.size / 1e6:.2f}"]
        row += ["" if trial.verdict is None else trial.verdict.verdict]
        table.add_row(*row)
    return table


def main() -> None:
    """The command ``fewbit``. Errors of fewbit are one line on standard error and exit code 1."""
    try:
        app()
    except FewbitError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print("fewbit:", *str(error).split(), markup=False)
        sys.exit(1)
