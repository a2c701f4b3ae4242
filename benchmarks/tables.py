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
DOCUMENTS = ("README.md",)


def accuracy(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["model", "metric", "", "score", "lost", "KL to float", "top-1 changed"]]
    for row in rows:
        flips = f"{row['flips']} of {row['images']}" if row.get("flips") is not None else ""
        kl = f"{row['KL']:.4f}" if row.get("KL") is not None else ""
        lost = f"{row['drop']:.2g}" if row.get("drop") is not None else ""
        table.append([row["model"], row["metric"], row["what"], f"{row['score']:.4g}", lost, kl, flips])
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


TABLES: dict[str, Callable[[list[dict[str, Any]]], list[list[str]]]] = {
    "accuracy": accuracy,
    "checkpoint": checkpoint,
    "footprint": footprint,
}


def rendered(name: str) -> str:
    data = json.loads((RESULTS / f"{name}.json").read_text())
    head, *body = TABLES[name](data["rows"])
    lines = [head, ["---"] * len(head), *body]
    machine = data["machine"]
    features = ", ".join(machine["features"])
    note = f"{machine['cpu']}, {machine['cores']} cores ({features}); torch {machine['versions']['torch']}"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}. `benchmarks/results/{name}.json`"


def main() -> None:
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text()
        fresh = re.sub(
            r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)",
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
