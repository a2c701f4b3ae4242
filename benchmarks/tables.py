"""Write the measured figures into the documents: what stands between <!-- table:NAME --> and <!-- end --> is replaced.

python benchmarks/tables.py [--check]     --check changes nothing and fails if a document is out of date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "BENCHMARKS.md", "docs/quantize-a-7b-on-a-laptop.md", "docs/how-many-bits.md")


def accuracy(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["model", "metric", "", "score", "lost"]]
    for row in rows:
        lost = f"{row['drop']:.2g}" if row.get("drop") is not None else ""
        table.append([row["model"], row["metric"], row["what"], f"{row['score']:.4g}", lost])
    return table


def checkpoint(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["model", "recipe", "float MB", "predicted MB", "file MB", "bit-equal in a fresh process"]]
    for row in rows:
        sizes = [f"{row[key]:.2f}" for key in ("float MB", "predicted MB", "file MB")]
        table.append([row["model"], row["recipe"], *sizes, "yes" if row["bit-equal"] else "NO"])
    return table


def footprint(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["model", "recipe", "time", "peak memory / float model"]]
    for row in rows:
        table.append([row["model"], row["recipe"], f"{row['seconds']:.2f} s", f"{row['peak / float model']:.2f}"])
    return table


def speed(rows: list[dict[str, Any]], lines: tuple[str, ...], columns: tuple[str, ...], value: str) -> list[list[str]]:
    """``value`` where lines and columns cross, each the combinations of some keys; instruction sets if they differ."""
    rows = [row for row in rows if value in row]
    limit = next(row["isa"] for row in rows if row["what"] == "torch FP32")

    def label(row: dict[str, Any], keys: tuple[str, ...]) -> str:
        parts = [f"{row[key]} {key}" if key in ("threads", "batch") else str(row[key]) for key in keys]
        other = f" ({row['isa']})" if "what" in keys and row["isa"] != limit else ""
        return ", ".join(parts).replace("1 threads", "1 thread").replace(" batch", " at once") + other

    heads = list(dict.fromkeys(label(row, columns) for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        # The first, where a candidate was measured twice.
        cells.setdefault(label(row, lines), {}).setdefault(label(row, columns), f"{row[value]:.3g}")
    return [["", *heads], *([line, *(found.get(head, "") for head in heads)] for line, found in cells.items())]


def linear(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Milliseconds with one thread."""
    shown = [
        {**row, "M x N x K": f"{row['M']} x {row['N']} x {row['K']}"}
        for row in rows
        if row["threads"] == 1 and row.get("M") in (1, 16, 128) and row["what"] not in ("torch BF16", "torchao int8")
    ]
    return speed(shown, ("M x N x K",), ("what",), "ms")


def memory(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Share of the streaming bandwidth at M = 1 beyond the cache."""
    shown = [
        {**row, "percent": 100 * row["stream"], "N x K": f"{row['N']} x {row['K']}"}
        for row in rows
        if row.get("stream") and row["M"] == 1
    ]
    return speed(shown, ("what",), ("N x K", "threads"), "percent")


def recurrent(rows: list[dict[str, Any]]) -> list[list[str]]:
    return speed(rows, ("model", "batch", "threads"), ("what",), "ms")


def encoder(rows: list[dict[str, Any]]) -> list[list[str]]:
    head, *table = speed(rows, ("what",), ("batch", "threads"), "ms")
    whats = list(dict.fromkeys(row["what"] for row in rows))
    scores = {row["what"]: [f"{row['Spearman']:.4f}", f"{row['drop']:.2g}"] for row in rows if "Spearman" in row}
    lines = [[*line, *scores.get(what, ["", ""])] for what, line in zip(whats, table, strict=True)]
    return [[*head, "Spearman", "lost"], *lines]


def decode(rows: list[dict[str, Any]]) -> list[list[str]]:
    return speed(rows, ("what",), ("model", "threads"), "tokens/s")


def cnn(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Accuracy, and what quantizing takes beyond the float model and the images."""
    table = [["model", "", "top-1 %", "lost", "KL to float", "top-1 changed", "unlike reference", "time", "memory"]]
    for row in rows:
        if row["part"] != "accuracy":
            continue
        found = [f"{row['top-1 %']:.2f}", "", "", ""]
        if row.get("KL") is not None:
            flips = f"{row['flips']} of {row['images']}"
            found[1:] = [f"{row['drop']:.2f}", f"{row['KL']:.2g}", flips]
        found.append(f"{row['unlike reference']}" if "unlike reference" in row else "")
        cost = [f"{row['seconds']:.1f} s", f"{row['peak MB'] - row['loaded MB']:.0f} MB"]
        table.append([row["model"], row["what"], *found, *cost])
    return table


def cnnlatency(rows: list[dict[str, Any]]) -> list[list[str]]:
    shown = [row for row in rows if row["part"] == "latency"]
    return speed(shown, ("model", "batch", "threads"), ("what",), "ms")


def qat(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What is lost, and how much of what rounding alone loses training gives back where that is more than chance."""
    table = [
        [
            "model",
            "",
            "bits",
            "score",
            "lost (95 %)",
            "given back",
            "KL to float",
            "top-1 changed",
            "time",
            "memory",
            "kernels",
        ]
    ]
    rows = [row for row in rows if row["part"] == "accuracy"]
    rounded = {(row["model"], row["bits"]): row for row in rows if row["what"] == "fewbit PTQ"}
    for row in rows:
        line = [row["model"], row["what"], row["bits"], f"{row['score']:.4g}", *[""] * 6, row["kernels"]]
        if "drop" in row:
            line[4] = f"{row['drop']:.2g} ({row['low']:.2g} to {row['high']:.2g})"
            line[6] = f"{row['KL']:.2g}" if "KL" in row else ""
            line[7] = f"{row['flips']} of {row['examples']}"
            line[7] += f": -{row['lost']} +{row['won']}" if "won" in row else ""
            line[8:10] = [f"{row['seconds']:.0f} s", f"{row['peak MB'] - row['loaded MB']:.0f} MB"]
        elif "won" in row:
            line[7] = f"the {row['least sure']} least sure: -{row['lost']} +{row['won']}"
        start = rounded.get((row["model"], row["bits"]))
        if start and row is not start and not row["what"].startswith("FP32") and start["low"] > 0:
            line[5] = f"{100 * (1 - row['drop'] / start['drop']):.0f} %"
        table.append(line)
    return table


def qatstep(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A step of the student beside one of the float model."""
    table = [["model", "bits", "batch", "ms", "x FP32", "MB", "x FP32", "kernels"]]
    for row in rows:
        if row["part"] == "step":
            times = [f"{row['ms']:.0f}", f"{row['x FP32']:.2f}", f"{row['step MB']:.0f}", f"{row['memory x FP32']:.2f}"]
            table.append([row["model"], row["bits"] or "FP32", str(row["batch"]), *times, row["kernels"]])
    return table


def llm(rows: list[dict[str, Any]]) -> list[list[str]]:
    texts = ("Austen", "Brown")
    table = [["", *texts, "KL to float", "same token", "bits", "size", "time", "peak memory", "kernels"]]
    for row in rows:
        line = [f"{row[f'perplexity {text}']:.2f} (+{row[f'{text} %']:.1f} %)" for text in texts]
        line += [f"{row['KL']:.3f}", f"{row['same top-1 %']:.1f} %", f"{row['bits']:.2f}", f"{row['MB']:.1f} MB"]
        table.append([row["what"], *line, f"{row['seconds']:.0f} s", f"{row['peak MB'] / 1e3:.2f} GB", row["kernels"]])
    return table


def llm_stream(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["", "from", "to", "time", "peak memory", "time after the kill", "same files", "tokens/s", "BF16"]]
    for row in rows:
        sizes = [f"{row['source GB']:.2f} GB", f"{row['out GB']:.2f} GB", f"{row['minutes']:.1f} min"]
        again = [f"{row['minutes after the kill']:.1f} min", "yes" if row["same files"] else "NO"]
        rates = [f"{row[key]:.2f}" for key in ("tokens/s", "BF16 tokens/s")]
        table.append([f"{row['model']}, {row['recipe']}", *sizes, f"{row['peak GB']:.2f} GB", *again, *rates])
    return table


def ablation(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["model", "", "top-1 %", "lost", "KL to float", "top-1 changed"]]
    for row in rows:
        scores = [f"{row['top-1 %']:.2f}", f"{row['drop']:.2f}", f"{row['KL']:.4f}"]
        table.append([row["model"], row["what"], *scores, f"{row['flips']} of {row['images']}"])
    return table


def avx2(rows: list[dict[str, Any]]) -> list[list[str]]:
    other = "other top-1 than fewbit's kernels"
    table = [["", "engine", "CPU", "KL to float", "top-1 changed", other, "error to them"]]
    for row in rows:
        counts = [f"{row[key]} of {row['images']}" for key in ("flips", other)]
        error = format(row["error to fewbit's kernels"], ".3g")
        table.append([row["what"], row["engine"], row["cpu"], f"{row['KL']:.4f}", *counts, error])
    return table


TABLES: dict[str, Callable[[list[dict[str, Any]]], list[list[str]]]] = {
    "accuracy": accuracy,
    "checkpoint": checkpoint,
    "footprint": footprint,
    "linear": linear,
    "memory": memory,
    "recurrent": recurrent,
    "encoder": encoder,
    "decode": decode,
    "ablation": ablation,
    "avx2": avx2,
    "cnn": cnn,
    "cnnlatency": cnnlatency,
    "qat": qat,
    "qatstep": qatstep,
    "llm": llm,
    "llm_stream": llm_stream,
}
# Where a table has another name than its file.
FILES = {"memory": "linear", "avx2": "avx2_engines", "cnnlatency": "cnn", "qatstep": "qat"}


def rendered(name: str) -> str:
    table, _, limit = name.partition("-")  # linear-avx2: the run that was limited to AVX2
    file = "-".join([FILES.get(table, table), *[limit] * bool(limit)])
    if not (RESULTS / f"{file}.json").exists():
        return f"Not measured yet: `benchmarks/{file}.py`"
    data = json.loads((RESULTS / f"{file}.json").read_text())
    head, *body = TABLES[table](data["rows"])
    lines = [head, ["---"] * len(head), *body]
    machine = data["machine"]
    features = ", ".join(machine["features"])
    note = f"{machine['cpu']}, {machine['cores']} cores ({features}); torch {machine['versions']['torch']}"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}. `benchmarks/results/{file}.json`"


def main() -> None:
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text()
        fresh = re.sub(
            r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)",
            lambda match: match[1] + rendered(match[2]) + "\n" + match[3],
            text,
            flags=re.DOTALL,
        )
        if fresh != text and "--check" in sys.argv:
            stale.append(document)
        elif fresh != text:
            path.write_text(fresh)
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `make docs`.")


if __name__ == "__main__":
    main()
