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
from dataclasses import dataclass, field, replace

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


#: What the choices are set against: more ridge than by default.
STRONG = {"ridge": 1.0, "drift_ridge": 1.0}


def strong(label: str, **setting: object) -> Run:
    """A run with one thing changed of :data:`STRONG`."""
    return Run(label, setting=STRONG | setting)


LOT = Run("LOT, λ = 1.3", "lot", {"scaling_factor": 1.3})
COMPARED = (LOT, Run("drift compensation"), strong("drift compensation, r = 1"))
CHOICES = [
    strong("r = r' = 1, λ = 1.3, anchor: 3 times the sum"),
    Run("the default: r = r' = 0.1"),
    strong("r = r' = 0.3", ridge=0.3, drift_ridge=0.3),
    strong("r = r' = 3", ridge=3.0, drift_ridge=3.0),
    strong("r' = 0.1", drift_ridge=0.1),
    strong("r' = 1e6, no drift compensated", drift_ridge=1e6),
    strong("λ = 1.0", scaling_factor=1.0),
    strong("λ = 1.5", scaling_factor=1.5),
    strong("λ = 2.0", scaling_factor=2.0),
    strong("anchor: 0.25 of the sum", anchor_scale=0.25),
    strong("anchor: the sum", anchor_scale=1.0),
    strong("anchor: 2 times the sum", anchor_scale=2.0),
    strong("anchor: 5 times the sum", anchor_scale=5.0),
    strong("anchor: the experts' mean", anchor="mean"),
    strong("anchor: the base", anchor="base"),
    strong("r = 3e-3, r' = 0.1, anchor: 0.25 of the sum", ridge=3e-3, drift_ridge=0.1, anchor_scale=0.25),
    strong("ridges by rows, r = r' = 0.3", ridge_by="rows", ridge=0.3, drift_ridge=0.3),
    strong("ridges by effective rank", ridge_by="effective_rank"),
    strong("filter: eigenvalues above 0.1", filter="rank", drift_ridge=0.1),
    strong("filter: effective rank", filter="effective_rank"),
    strong("filter: Gavish and Donoho's rank", filter="gavish_donoho"),
    strong("filter: exponential, t = 1", filter="exponential"),
    strong("tasks weighted by Gram norms", weighting="gram"),
    strong("tasks weighted by feature energies", weighting="energy"),
    strong("a quarter of the experts' own inputs", feature_mix=0.25),
    strong("the experts' own inputs alone", feature_mix=1.0),
    LOT,
    Run("RegMean++, no shrinkage", "regmean_plus_plus", {"reduce_non_diagonal_ratio": 1.0}),
    Run("FeatCal, as published", "featcal"),
    Run("FeatCal, ρ = 3.3", "featcal", {"ridge": 0.01, "anchor_scale": 3.3}),
]
#: Part -> its runs, in the order in which they are measured: those that are compared in turn.
PARTS = {
    "seeds": [replace(run, seed=seed) for seed in SEEDS for run in COMPARED],
    "choices": CHOICES,
    "samples": [replace(run, samples=samples) for samples in SAMPLES for run in COMPARED],
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
    for run in COMPARED:
        own = [records[replace(run, seed=seed).key] for seed in SEEDS]
        mean, seconds = (statistics.fmean(r["recovered"] for r in own), statistics.median(r["seconds"] for r in own))
        rows.append([run.label, *map(share, own), f"{100 * mean:.1f} %", f"{seconds:.1f}"])
    return markdown_table(["", *(f"seed {seed}" for seed in SEEDS), "mean", "median seconds"], rows)


def choices_table(records: dict) -> str:
    measured = [run for run in CHOICES if run.key in records]
    rows = [[run.label, share(records[run.key]), f"{records[run.key]['drift']:.3f}"] for run in measured]
    return markdown_table(["", "gap recovered", "drift of the last layer"], rows)


def samples_table(records: dict) -> str:
    rows = []
    for run in COMPARED:
        own = [records.get(replace(run, samples=samples).key) for samples in SAMPLES]
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
