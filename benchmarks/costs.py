"""What each method's merge of a suite's experts costs: processor seconds and memory, by calibration samples a task.

    python benchmarks/costs.py [--suite vision8] [--entry lot]

Every merge runs in a process of its own, on one thread, and is not evaluated. Writes benchmarks/results/costs.json,
where what is not measured now stays as it was, and the tables between the markers of docs/results.md. Linux only, for
the sake of /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from problems import reset_peak, resident
from results import PAGE, RESULTS, environment, measured, put

from statsmerge_ext.evaluation.comparison import (
    CALIBRATION_SAMPLES,
    ENTRIES,
    calibration_of,
    load_models,
    merge_suite,
    needs_of,
)
from statsmerge_ext.evaluation.report import markdown_table
from statsmerge_ext.evaluation.suites import get_suite
from statsmerge_ext.memory import give_back_freed_memory

PATH = RESULTS / "costs.json"
SUITES = ("vision8", "vit8")
SAMPLES = (8, CALIBRATION_SAMPLES, 256)


def budgets(entry: str) -> tuple[int, ...]:
    """The numbers of samples with which an entry is measured: learning takes long, in proportion to them."""
    learned = any(step.partition("/")[0] in ("stats_merging", "adamerging") for step in entry.split("+"))
    return SAMPLES if needs_of(entry) and not learned else (CALIBRATION_SAMPLES,)


def merge_once(suite_name: str, entry: str, samples: int) -> dict[str, float]:
    """Processor seconds of one merge, and the most bytes held during it beyond those held before."""
    torch.set_num_threads(1)
    suite = get_suite(suite_name)
    suite.prepare(progress=False)
    models, calibration = load_models(suite), calibration_of(suite, samples)
    give_back_freed_memory()  # what preparing has freed would be used again, and not show
    before = resident("VmRSS")
    reset_peak()
    start = time.process_time()
    merge_suite(suite, entry, models, calibration)
    seconds = time.process_time() - start
    return {"seconds": round(seconds, 2), "bytes": resident("VmHWM") - before}


def table(records: dict) -> str:
    """Seconds, then megabytes, by number of samples."""
    header = ["", *(f"s, {count}" for count in SAMPLES), *(f"MB, {count}" for count in SAMPLES)]
    rows = []
    for entry in (entry for entry in ENTRIES if entry in records):
        own = [records[entry].get(str(count)) for count in SAMPLES]
        seconds = [f"{cost['seconds']:.1f}" if cost else "" for cost in own]
        rows.append([entry, *seconds, *(f"{cost['bytes'] / 1e6:.0f}" if cost else "" for cost in own)])
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all")
    parser.add_argument("--entry", action="append", choices=ENTRIES, help="default: all")
    parser.add_argument("--one", nargs=3, metavar=("SUITE", "ENTRY", "SAMPLES"), help="measure this merge, here")
    options = parser.parse_args()
    if options.one:
        suite, entry, samples = options.one
        return print(json.dumps(merge_once(suite, entry, int(samples))))
    content = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    for suite in options.suite or SUITES:
        records = content.setdefault(suite, {"merges": {}})
        records["environment"] = environment() | {"threads": 1}
        for entry in options.entry or ENTRIES:
            for samples in budgets(entry):
                command = [sys.executable, __file__, "--one", suite, entry, str(samples)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                records["merges"].setdefault(entry, {})[str(samples)] = json.loads(done.stdout.splitlines()[-1])
                print(suite, entry, samples, records["merges"][entry][str(samples)], flush=True)
        PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        put(PAGE, f"costs-{suite}", f"{measured(records['environment'])}\n\n{table(records['merges'])}")


if __name__ == "__main__":
    main()
