"""Measure the tables of docs/results.md again: every method on every suite, three seeds.

    python benchmarks/results.py [--suite vision8] [--seeds 3]

Writes benchmarks/results/SUITE.json (all that was measured) and the tables between the markers in docs/results.md.
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

from statsmerge_ext.evaluation.comparison import Comparison, compare
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list_suites(), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    keep_freed_memory()
    for name in options.suite or list_suites():
        suite = get_suite(name)
        notes = suite.prepare()
        comparison = compare(suite, seeds=options.seeds)
        comparison.notes = notes
        facts = environment()
        content = {"environment": facts, **to_json(comparison)}
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        write_table(comparison, facts)
        print(format_table(comparison), flush=True)


if __name__ == "__main__":
    main()
