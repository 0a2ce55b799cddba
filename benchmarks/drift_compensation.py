"""Drift compensation and its choices on a suite's validation split, beside LOT Merging and its relatives.

    python benchmarks/drift_compensation.py [--suite vision8] [--part choices] [--report]

Measures what benchmarks/results/drift_compensation.json lacks and writes the tables between the markers of
docs/drift_compensation.md. The test split is never read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from results import RESULTS, ROOT, environment, put

from statsmerge_ext.evaluation.comparison import calibration_of, load_models, merge_suite
from statsmerge_ext.evaluation.drift import feature_drift
from statsmerge_ext.evaluation.report import markdown_table
from statsmerge_ext.evaluation.run import evaluate_experts, evaluate_model
from statsmerge_ext.evaluation.suites import get_suite, list_suites
from statsmerge_ext.memory import keep_freed_memory
from statsmerge_ext.methods import get_method

PATH, PAGE = RESULTS / "drift_compensation.json", ROOT / "docs" / "drift_compensation.md"
SEEDS, SAMPLES = (0, 1, 2), (8, 16, 32, 64, 256)


@dataclass(frozen=True)
class Run:
    """One merge: what the table calls it, the method, hyperparameters beside its defaults, samples a task, seed."""

    label: str
    entry: str = "drift_compensation"
    setting: dict = field(default_factory=dict)
    samples: int = 64
    seed: int = 0

    @property
    def key(self) -> str:
        """What decides the result: a default that changes makes it another run."""
        hyperparameters = get_method(self.entry).hyperparameters | self.setting
        return json.dumps([self.entry, dict(sorted(hyperparameters.items())), self.samples, self.seed])


DEFAULT, LOT = Run("drift compensation"), Run("LOT, λ = 1.3", "lot", {"scaling_factor": 1.3})
CHOICES = [
    Run("the default"),
    Run("λ = 1.0", setting={"scaling_factor": 1.0}),
    Run("λ = 1.5", setting={"scaling_factor": 1.5}),
    Run("λ = 2.0", setting={"scaling_factor": 2.0}),
    Run("anchor: 0.25 of the sum", setting={"anchor_scale": 0.25}),
    Run("anchor: the sum", setting={"anchor_scale": 1.0}),
    Run("anchor: 2 times the sum", setting={"anchor_scale": 2.0}),
    Run("anchor: 5 times the sum", setting={"anchor_scale": 5.0}),
    Run("anchor: the experts' mean", setting={"anchor": "mean"}),
    Run("anchor: the base", setting={"anchor": "base"}),
    Run("r = r' = 0.1", setting={"ridge": 0.1, "drift_ridge": 0.1}),
    Run("r = r' = 0.3", setting={"ridge": 0.3, "drift_ridge": 0.3}),
    Run("r = r' = 3", setting={"ridge": 3.0, "drift_ridge": 3.0}),
    Run("r' = 0.1", setting={"drift_ridge": 0.1}),
    Run("r' = 1e6, no drift compensated", setting={"drift_ridge": 1e6}),
    Run(
        "r = 3e-3, r' = 0.1, anchor: 0.25 of the sum", setting={"ridge": 3e-3, "drift_ridge": 0.1, "anchor_scale": 0.25}
    ),
    Run("ridges by rows, r = r' = 0.3", setting={"ridge_by": "rows", "ridge": 0.3, "drift_ridge": 0.3}),
    Run("ridges by effective rank", setting={"ridge_by": "effective_rank"}),
    Run("filter: eigenvalues above 0.1", setting={"filter": "rank", "drift_ridge": 0.1}),
    Run("filter: effective rank", setting={"filter": "effective_rank"}),
    Run("filter: Gavish and Donoho's rank", setting={"filter": "gavish_donoho"}),
    Run("filter: exponential, t = 1", setting={"filter": "exponential"}),
    Run("tasks weighted by Gram norms", setting={"weighting": "gram"}),
    Run("tasks weighted by feature energies", setting={"weighting": "energy"}),
    Run("a quarter of the experts' own inputs", setting={"feature_mix": 0.25}),
    Run("the experts' own inputs alone", setting={"feature_mix": 1.0}),
    Run("LOT, λ = 1.3", "lot", {"scaling_factor": 1.3}),
    Run("RegMean++, no shrinkage", "regmean_plus_plus", {"reduce_non_diagonal_ratio": 1.0}),
    Run("FeatCal, as published", "featcal"),
    Run("FeatCal, ρ = 3.3", "featcal", {"ridge": 0.01, "anchor_scale": 3.3}),
]
#: Part -> its runs, in the order in which they are measured: those that are compared in turn.
PARTS = {
    "seeds": [Run(run.label, run.entry, run.setting, seed=seed) for seed in SEEDS for run in (LOT, DEFAULT)],
    "choices": CHOICES,
    "samples": [Run(run.label, run.entry, run.setting, samples) for samples in SAMPLES for run in (LOT, DEFAULT)],
}


def measure(suite_name: str, runs: list[Run], records: dict) -> None:
    """Merge and evaluate what is missing; every result is written when it is there."""
    missing = [run for run in runs if run.key not in records]
    if not missing:
        return
    suite = get_suite(suite_name)
    suite.prepare()
    models = load_models(suite)
    base = statistics.fmean(evaluate_model(models[0], suite, "validation").values())
    experts = statistics.fmean(evaluate_experts(suite, "validation").values())
    held_out = {name: next(iter(suite.task(name).batches("validation", 64)))[0] for name in suite.task_names}
    for run in missing:
        calibration = calibration_of(suite, run.samples, run.seed)
        start = time.perf_counter()
        merged = merge_suite(suite, run.entry, models, calibration, hyperparameters=run.setting).model
        seconds = time.perf_counter() - start
        average = statistics.fmean(evaluate_model(merged, suite, "validation").values())
        drift = feature_drift(merged, models[1], held_out, suite.forward)
        records[run.key] = {
            "recovered": round((average - base) / (experts - base), 4),
            "drift": round(list(drift.values())[-1], 4),
            "seconds": round(seconds, 2),
            "environment": environment(),
        }
        print(suite_name, run.label, run.samples, run.seed, records[run.key], flush=True)
        content = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
        content.setdefault(suite_name, {})[run.key] = records[run.key]
        PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def share(record: dict | None) -> str:
    """As a table's cell; empty where nothing was measured."""
    return f"{100 * record['recovered']:.1f} %" if record else ""


def seeds_table(records: dict) -> str:
    rows = []
    for run in (LOT, DEFAULT):
        own = [records[Run(run.label, run.entry, run.setting, seed=seed).key] for seed in SEEDS]
        mean, seconds = (statistics.fmean(r["recovered"] for r in own), statistics.median(r["seconds"] for r in own))
        rows.append([run.label, *map(share, own), f"{100 * mean:.1f} %", f"{seconds:.1f}"])
    return markdown_table(["", *(f"seed {seed}" for seed in SEEDS), "mean", "median seconds"], rows)


def choices_table(records: dict) -> str:
    measured = [run for run in CHOICES if run.key in records]
    rows = [[run.label, share(records[run.key]), f"{records[run.key]['drift']:.3f}"] for run in measured]
    return markdown_table(["", "gap recovered", "drift of the last layer"], rows)


def samples_table(records: dict) -> str:
    rows = []
    for run in (LOT, DEFAULT):
        own = [records.get(Run(run.label, run.entry, run.setting, samples).key) for samples in SAMPLES]
        rows.append([run.label, *map(share, own)])
    return markdown_table(["samples a task", *map(str, SAMPLES)], rows)


TABLES: dict[str, Callable[[dict], str]] = {"seeds": seeds_table, "choices": choices_table, "samples": samples_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="vision8", choices=list_suites())
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    keep_freed_memory()
    content = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    records = content.get(options.suite, {})
    for part in options.part or PARTS:
        if not options.report:
            measure(options.suite, PARTS[part], records)
        measured = [run.key in records for run in PARTS[part]]
        if all(measured) or (part != "seeds" and any(measured)):
            put(PAGE, f"{part}-{options.suite}", TABLES[part](records))


if __name__ == "__main__":
    main()
