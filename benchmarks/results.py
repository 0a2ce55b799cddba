"""Measure the tables of docs/results.md again: every method on every suite, three seeds.

    python benchmarks/results.py [--suite vision8] [--seeds 3]

Writes benchmarks/results/SUITE.json (all that was measured) and the tables between the markers in docs/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from pathlib import Path

import torch

from statsmerge_ext.evaluation.comparison import Comparison, compare
from statsmerge_ext.evaluation.report import format_table, to_json
from statsmerge_ext.evaluation.suites import get_suite, list_suites

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


def write_tables(comparison: Comparison, facts: dict) -> None:
    """Put the table between the markers of its suite in docs/results.md."""
    caption = (
        f"Test accuracy in percent, {comparison.samples} unlabelled calibration samples a task, {comparison.seeds} "
        f"seeds, ± half the range; seconds are medians on {facts['threads']} thread(s). Measured {facts['date']} at "
        f"commit {facts['commit']}, torch {facts['torch']}."
    )
    notes = "".join(f"\n\n{note}" for note in comparison.notes)
    block = f"\n{caption}{notes}\n\n{format_table(comparison)}\n"
    begin, end = f"<!-- {comparison.suite} -->", f"<!-- /{comparison.suite} -->"
    text = PAGE.read_text(encoding="utf-8")
    text, found = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + block + end, text, flags=re.S)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {comparison.suite}: {begin} … {end}")
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list_suites(), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.suite or list_suites():
        suite = get_suite(name)
        notes = suite.prepare()
        comparison = compare(suite, seeds=options.seeds)
        comparison.notes = notes
        facts = environment()
        content = {"environment": facts, **to_json(comparison)}
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        write_tables(comparison, facts)
        print(format_table(comparison), flush=True)


if __name__ == "__main__":
    main()
