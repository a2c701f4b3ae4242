"""Training what is quantized: what it gives back, what it takes, and what a step costs.

    python benchmarks/qat.py [--fashion-mnist] [--resnet-20] [--minilm] [--resume] [--quick]
    python benchmarks/qat.py --row WHAT BITS MODEL         one candidate in this process; the last line is JSON

All models if none is named; rows of the others stay in the file, which is written after every row. ``--resume`` leaves out
what is in it. Data: see ``qat_tasks``.

Accuracy: each candidate is made and evaluated in a fresh process, on all cores. At the same bits all train for the same number
of steps on batches of the same data, of which ``finetune`` holds out a tenth, with AdamW, a warm-up and a cosine, towards the
float model's outputs, without labels:
``finetune`` with its defaults, and the loop below for peers. Of several learning rates (RATES) a peer keeps the model with the
best score, on the data that it is evaluated on; ours has one. A float model has nothing to learn from its own outputs; what it
gains from labels in as many steps is "FP32 with labels", to be compared with "fewbit QAT with labels" alone. ``seconds``,
those of one rate, and ``peak MB`` are from the float model and the data in memory to the trained model. ``lost`` and ``won``:
images that were right and are wrong, and the other way; of the float model, what they were if its LEAST_SURE images got their
second class. ``simulated``: the share of outputs whose top-1 is the same in the student and in what it is converted to.
``lowered``: the score on fewbit's integer kernels. MiniLM has no classes: its top-1 is the nearest other sentence.

Step: forward, backward and update on one batch, in turns in one process, medians; and the memory that five of them take
beyond model, gradients, optimizer and data, in fresh processes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fewbit
from cnn import forget_peak, memory
from fewbit.ops import native
from measure import ISA, RESULTS, in_turns, kl_and_flips, options, write
from peers import QAT
from qat_tasks import CASES, Case, call

STEPS = {
    "Fashion-MNIST": {"W8A8": 200, "W4A8": 200, "W4A4": 800},
    "ResNet-20": {"W8A8": 400, "W4A8": 600, "W4A4": 2000},
    "MiniLM": {"W8A8": 60, "W4A8": 150, "W4A4": 150},
}
BITS = ("W8A8", "W4A8", "W4A4")
STATIC = {"W8A8": "int8-static", "W4A8": "int4-static", "W4A4": "int4-int4-static"}
DYNAMIC = {"W8A8": "int8-dynamic", "W4A8": "int4-dynamic", "W4A4": "int4-dynamic"}
CALIBRATION = 1000  # examples, as in finetune
BATCH = {"Fashion-MNIST": 64, "ResNet-20": 64, "MiniLM": 32}
FLOAT, LABELS, PTQ, OURS, OURS_LABELS = (
    "FP32",
    "FP32 with labels",
    "fewbit PTQ",
    "fewbit QAT",
    "fewbit QAT with labels",
)
# Found by trials of 30 to 80 steps, judged on batches of the training data that were left out; 1e-4 is worse for W4A4 in 600
# steps of Fashion-MNIST too.
RATES = {
    LABELS: {"W8A8": (1e-5,), "W4A4": (1e-5,)},
    "torchao PT2E QAT": {"W8A8": (1e-5,), "W4A8": (1e-5, 1e-4), "W4A4": (1e-3,)},
    "torchao QAT": {"W8A8": (1e-5,), "W4A8": (1e-4,), "W4A4": (1e-4,)},
}
Loss = Callable[[Any, Any], Tensor]  # of the output and the batch
SECONDS = 15.0  # for the steps of each model
TRIAL = 12  # steps with --quick
LEAST_SURE = 200  # images


def candidates(model_name: str) -> list[tuple[str, str]]:
    """What, and the bits."""
    peer = "torchao QAT" if model_name == "MiniLM" else "torchao PT2E QAT"
    pairs = [(what, bits) for bits in BITS for what in (PTQ, OURS, peer)]
    labelled = [(what, bits) for bits in ("W8A8", "W4A4") for what in (LABELS, OURS_LABELS)]
    return [(FLOAT, ""), *pairs, *([] if model_name == "MiniLM" else labelled)]


def recipe(bits: str, case: Case) -> fewbit.Recipe:
    """Of a CNN the ranges of inputs are fixed; of MiniLM they are found on the fly, as torchao's are (no preset: W4A4)."""
    if case.is_classifier:
        return fewbit.load_recipe(STATIC[bits])
    preset = fewbit.load_recipe(DYNAMIC[bits])
    if bits != "W4A4":
        return preset
    rules = [
        replace(rule, scheme=replace(rule.scheme, input=replace(rule.scheme.input, format="int4")))
        if rule.scheme is not None and rule.scheme.input is not None
        else rule
        for rule in preset.rules
    ]
    return replace(preset, name="int4-int4-dynamic", rules=tuple(rules))


# Training ------------------------------------------------------------------------------------------------------------


def distance(output: Tensor, target: Tensor) -> Tensor:
    """What ``finetune`` takes: the divergence of logits at temperature 2, the squared error of embeddings as a share."""
    if target.norm(dim=-1).sub(1).abs().max() < 1e-3:
        return (output - target).square().sum() / target.square().sum()
    p, q = (torch.log_softmax(x / 2, 1) for x in (target, output))
    return 4 * nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def distil(student: nn.Module, case: Case, steps: int, rate: float, loss: Loss | None = None) -> None:
    """The loop of the peers: as ``finetune``, but what it ends with is what is kept."""
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
    stream = map(case.augment, shuffled(case.batches))
    for step in range(steps):
        share = step / steps
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 10 * share + 0.01) * 0.5 * (1 + math.cos(math.pi * share))
        batch = next(stream)
        with torch.no_grad():
            target = call(case.model, batch)
        optimizer.zero_grad()
        output = call(student, batch)
        (distance(output, target) + (0 if loss is None else loss(output, batch))).backward()
        optimizer.step()


def shuffled(batches: list[Any]) -> Iterator[Any]:
    """Without end; batches of images are cut anew."""
    random = torch.Generator().manual_seed(0)
    if isinstance(batches[0], dict):
        while True:
            yield from (batches[i] for i in torch.randperm(len(batches), generator=random))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    while True:
        for part in torch.randperm(len(labels), generator=random).split(len(batches[0][1])):
            yield images[part], labels[part]


def with_labels(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def calibration(case: Case) -> list[Any]:
    """CALIBRATION examples or a few less, without labels."""
    if isinstance(case.batches[0], dict):
        return case.batches[:: math.ceil(len(case.batches) * BATCH["MiniLM"] / CALIBRATION)]  # short and long texts
    return list(torch.cat([images for images, _ in case.batches])[:CALIBRATION].split(100))


def made(what: str, bits: str, case: Case, steps: int, rate: float | None) -> tuple[nn.Module, nn.Module | None]:
    """The model, and the student that it is converted from. ``rate``: for what RATES names."""
    students: list[nn.Module] = []

    def kept(student: nn.Module) -> nn.Module:
        students.append(student)
        return fewbit.convert(student)

    if what == FLOAT:
        return case.model, None
    if what == PTQ:
        return fewbit.quantize(case.model, recipe(bits, case), calibration(case)), None
    if what in QAT:
        train = functools.partial(distil, case=case, steps=steps, rate=rate)
        return QAT[what](case.model, calibration(case), bits, train), None
    if what == LABELS:
        assert rate is not None
        model = copy.deepcopy(case.model)
        distil(model, case, steps, rate, with_labels)
        return model, None
    # finetune does not hand out the student.
    with mock.patch("fewbit.distillation.convert", kept):
        loss = with_labels if "labels" in what else None
        model = fewbit.finetune(
            case.model, recipe(bits, case), case.batches, steps=steps, loss=loss, augment=case.augment
        )
    return model, students[0]


# In the child --------------------------------------------------------------------------------------------------------


def accuracy(what: str, bits: str, model_name: str, float_file: Path, quick: bool) -> dict[str, Any]:
    """Make one model in this process and evaluate it; that of the float model writes its outputs to the file."""
    case = CASES[model_name]()
    if quick:
        case = replace(case, examples=case.examples[:8])
    steps = 0 if what in (FLOAT, PTQ) else TRIAL if quick else STEPS[model_name][bits]
    for module in ("torch._dynamo", "torchao.quantization.qat", "torchao.quantization.pt2e"):
        with contextlib.suppress(ImportError):
            __import__(module)
    gc.collect()
    forget_peak()
    loaded, began = memory("VmRSS"), time.perf_counter()
    rate, *others = RATES.get(what, {}).get(bits, (None,))
    model, student = made(what, bits, case, steps, rate)
    seconds, peak = time.perf_counter() - began, memory("VmHWM")
    outputs = case.outputs(model)
    for other in others:
        found = case.outputs(made(what, bits, case, steps, other)[0])
        if case.score(found) > case.score(outputs):
            rate, outputs = other, found
    row: dict[str, Any] = {"part": "accuracy", "model": model_name, "bits": bits, "what": what, "kernels": native.isa()}
    row["score"] = case.score(outputs)
    if what == FLOAT:
        torch.save(outputs, float_file)
        return row | (least_sure(outputs, case.truth) if case.truth is not None else {})
    before = torch.load(float_file)
    row["drop"], row["low"], row["high"] = case.drop(before, outputs)
    row["flips"], row["examples"] = int((case.top(before) != case.top(outputs)).sum()), len(outputs)
    if case.truth is not None:
        row["KL"] = kl_and_flips(before, outputs)[0]
        right = [logits.argmax(1) == case.truth[: len(logits)] for logits in (before, outputs)]
        row |= {"lost": int((right[0] & ~right[1]).sum()), "won": int((~right[0] & right[1]).sum())}
    row["error"] = float((outputs - before).norm() / before.norm())
    if what != PTQ:
        row |= {"steps": steps, "batch": BATCH[model_name], "learning rate": rate}
    row |= {"seconds": seconds, "loaded MB": loaded, "peak MB": peak}
    if student is not None:
        simulated = case.outputs(student.eval())
        row["simulated"] = float((case.top(simulated) == case.top(outputs)).double().mean())
    if what in (PTQ, OURS, OURS_LABELS) and case.is_classifier:
        row |= lowered(model, case)
    return row


def least_sure(logits: Tensor, truth: Tensor) -> dict[str, int]:
    """How many of LEAST_SURE images are right, and how many would be if they got their second class: those where the two
    likeliest classes are nearest to each other. They are what rounding changes first."""
    values, classes = logits.softmax(1).topk(2)
    chosen = (values[:, 0] - values[:, 1]).argsort()[:LEAST_SURE]
    first, second = (classes[chosen] == truth[chosen, None]).sum(0).tolist()
    return {"least sure": len(chosen), "lost": first, "won": second}


def lowered(model: nn.Module, case: Case) -> dict[str, Any]:
    """The score of the model on fewbit's integer kernels; why there is none."""
    example = case.examples[0]
    try:
        fast = fewbit.lower(model, example if isinstance(example, dict) else example[:1])
        return {"lowered": case.score(case.outputs(fast))}
    except fewbit.FewbitError as error:
        return {"not lowered": str(error)}


def step_of(model: nn.Module, case: Case) -> Callable[[], None]:
    """One step on batches of one size, towards outputs that are known."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batches = shuffled(case.batches) if case.is_classifier else iter([case.batches[len(case.batches) // 2]])
    batch = next(batches)
    with torch.no_grad():
        target = call(case.model, batch)

    def step() -> None:
        optimizer.zero_grad()
        distance(call(model, batch), target).backward()
        optimizer.step()

    return step


def student_of(bits: str, case: Case) -> nn.Module:
    model = case.model if not bits else fewbit.prepare_qat(case.model, recipe(bits, case), calibration(case)[:2])
    return model.train()


def step_memory(bits: str, model_name: str) -> dict[str, Any]:
    """Of five steps after a first one."""
    case = CASES[model_name]()
    step = step_of(student_of(bits, case), case)
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not to be taken from what is in use
    forget_peak()
    loaded = memory("VmRSS")
    for _ in range(5):
        step()
    return {"MB": memory("VmHWM") - loaded, "loaded MB": loaded}


def step_times(model_name: str, quick: bool) -> dict[str, Any]:
    case = CASES[model_name]()
    steps = {bits: [step_of(student_of(bits, case), case)] for bits in ("W8A8", "W4A4", "")}
    return in_turns(steps, 0.1 if quick else SECONDS)


# In the parent -------------------------------------------------------------------------------------------------------


def in_child(*words: str, quick: bool) -> dict[str, Any]:
    """What a fresh process prints as its last line."""
    command = [sys.executable, __file__, "--row", *words, *["--quick"] * quick]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def child(words: list[str]) -> dict[str, Any]:
    quick = "--quick" in words
    what, bits, model_name, file = (*[word for word in words if word != "--quick"], "float.pt")[:4]
    try:
        if what == "step times":
            return step_times(model_name, quick)
        if what == "step memory":
            return step_memory(bits, model_name)
        return accuracy(what, bits, model_name, Path(file), quick)
    except ImportError as error:
        return {"missing": str(error)}


def steps_of(model_name: str, quick: bool) -> list[dict[str, Any]]:
    times = in_child("step times", "", model_name, quick=quick)
    memories = {bits: in_child("step memory", bits, model_name, quick=quick)["MB"] for bits in times}
    return [
        {
            "part": "step",
            "model": model_name,
            "bits": bits,
            "what": OURS if bits else FLOAT,
            "batch": BATCH[model_name],
            "ms": 1e3 * times[bits],
            "x FP32": times[bits] / times[""],
            "step MB": memories[bits],
            "memory x FP32": memories[bits] / memories[""],
            "kernels": native.isa(),
        }
        for bits in times
    ]


def place(row: dict[str, Any]) -> tuple[str, ...]:
    return row["part"], row["model"], row["what"], row["bits"]


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(child(sys.argv[2:])))
        return
    flags = {name: name.lower() for name in CASES}
    chosen = options(__doc__, *flags.values(), "resume")
    named = [name for name, flag in flags.items() if getattr(chosen, flag.replace("-", "_"))] or list(CASES)
    file = RESULTS / f"qat{'' if ISA == 'native' else '-' + ISA}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() and not chosen.quick else []
    if not chosen.resume:
        rows = [row for row in rows if row["model"] not in named]

    busy: list[str] = []

    def add(found: list[dict[str, Any]]) -> None:
        places = [("accuracy", name, *pair) for name in CASES for pair in candidates(name)]
        for row in found:
            print(json.dumps(row), flush=True)
        rows.extend(found)
        rows.sort(key=lambda row: places.index(place(row)) if place(row) in places else len(places))
        with contextlib.redirect_stdout(io.StringIO()) as said:  # too wide a table
            write("qat", rows, keep=not chosen.quick)
        busy[:] = said.getvalue().splitlines()[-1:]

    for name in named[:1] if chosen.quick else named:
        done = {place(row) for row in rows}
        with tempfile.TemporaryDirectory() as folder:
            for what, bits in candidates(name):
                if chosen.quick and bits not in ("", "W4A4"):
                    continue
                if what != FLOAT and ("accuracy", name, what, bits) in done:
                    continue
                print(f"{name}: {what} {bits}", file=sys.stderr)
                row = in_child(what, bits, name, str(Path(folder) / "float.pt"), quick=chosen.quick)
                if "missing" in row:
                    print(f"not measured: {row['missing']}", file=sys.stderr)
                elif place(row) not in done:
                    add([row])
        if ("step", name, FLOAT, "") not in done:
            print(f"{name}: steps", file=sys.stderr)
            add(steps_of(name, chosen.quick))
    print(*busy)


if __name__ == "__main__":
    main()
