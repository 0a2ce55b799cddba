"""Measure the tables of docs/results.md again: every method on every suite, three seeds.

    python benchmarks/results.py [--suite vision8] [--entry lot] [--seeds 3]

Writes benchmarks/results/SUITE.json (all that was measured) and the tables between the markers in docs/results.md.
With --entry the other rows stay as they were measured before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch
from page import fill

from statsmerge_ext.evaluation.comparison import ENTRIES, Comparison, Row, compare
from statsmerge_ext.evaluation.report import format_table, to_json
from statsmerge_ext.evaluation.suites import get_suite, list_suites
from statsmerge_ext.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"


def environment() -> dict:
    """When, on what and at which commit this was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def write_table(comparison: Comparison, facts: dict) -> None:
    """Put the table between the markers of its suite in docs/results.md."""
    caption = (
        f"Test accuracy in percent, {comparison.samples} unlabelled calibration samples a task, {comparison.seeds} "
        f"seeds, ± half the range; seconds are medians on {facts['threads']} thread(s). {measured(facts)}"
    )
    put(PAGE, comparison.suite, "\n\n".join([caption, *comparison.notes, format_table(comparison)]))


def measured(facts: dict) -> str:
    """A sentence on when and with what."""
    return f"Measured {facts['date']} at commit {facts['commit']}, torch {facts['torch']}."


def put(page: Path, name: str, block: str) -> None:
    """Replace what is between the markers of ``name`` in a Markdown page."""
    page.write_text(fill(page.read_text(encoding="utf-8"), name, block), encoding="utf-8")


def joined(known: dict, content: dict) -> dict:
    """What was measured now, with the rows of what was measured before that it lacks.

    Raises ValueError when those are not comparable.
    """
    for name in ("tasks", "seeds", "samples"):
        if known[name] != content[name]:
            raise ValueError(f"{name}: {known[name]} were measured before, now {content[name]}")
    order = ("base", "experts", *ENTRIES)
    both = {part: known[part] | content[part] for part in ("commits", "rows")}
    return content | {part: {row: values[row] for row in order if row in values} for part, values in both.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list_suites(), help="default: all")
    parser.add_argument("--entry", action="append", choices=ENTRIES, help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    keep_freed_memory()
    for name in options.suite or list_suites():
        suite = get_suite(name)
        notes = suite.prepare()
        path = RESULTS / f"{name}.json"
        comparison = compare(suite, options.entry or ENTRIES, seeds=options.seeds)
        comparison.notes = notes
        facts = environment()
        commits = {row: facts["commit"] for row in comparison.rows}
        content = {"environment": facts, "commits": commits, **to_json(comparison)}
        if options.entry and path.exists():
            content = joined(json.loads(path.read_text(encoding="utf-8")), content)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        comparison.rows = {row: Row(**values) for row, values in content["rows"].items()}
        write_table(comparison, facts | {"commit": ", ".join(sorted(set(content["commits"].values())))})
        print(format_table(comparison), flush=True)


if __name__ == "__main__":
    main()
