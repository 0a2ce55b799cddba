"""Drift compensation beside LOT Merging on a suite's validation split: share of the gap recovered, and seconds.

    python benchmarks/drift_compensation.py [--suite vision8] [--samples 64] [--seeds 3] [--setting 0]

Adds to benchmarks/results/drift_compensation.json: one entry a suite, number of samples and setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from results import RESULTS, environment

from statsmerge_ext.evaluation.comparison import calibration_of, load_models, merge_suite
from statsmerge_ext.evaluation.run import evaluate_experts, evaluate_model
from statsmerge_ext.evaluation.suites import get_suite, list_suites
from statsmerge_ext.memory import keep_freed_memory

SETTINGS = [
    ("drift_compensation", {"scaling_factor": 1.3}),
    ("lot", {"scaling_factor": 1.3}),
    ("drift_compensation", {"scaling_factor": 1.0}),
    ("drift_compensation", {"drift_ridge": 3e-3}),  # one ridge for both parts of the target
    ("drift_compensation", {"drift_ridge": 1e6}),  # no drift is compensated
    ("drift_compensation", {"scaling_factor": 1.5}),
    ("lot", {"scaling_factor": 1.5}),
    ("regmean_plus_plus", {"reduce_non_diagonal_ratio": 1.0}),
    ("featcal", {"anchor_scale": 0.66}),
]
PATH = RESULTS / "drift_compensation.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="vision8", choices=list_suites())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--setting", type=int, action="append", help="number of one of SETTINGS; default: all")
    options = parser.parse_args()
    keep_freed_memory()
    suite = get_suite(options.suite)
    suite.prepare()
    models = load_models(suite)
    base = statistics.fmean(evaluate_model(models[0], suite, "validation").values())
    experts = statistics.fmean(evaluate_experts(suite, "validation").values())
    settings = SETTINGS if options.setting is None else [SETTINGS[i] for i in options.setting]
    recovered, seconds = [[] for _ in settings], [[] for _ in settings]
    for seed in range(options.seeds):  # settings in turn, so that all of them see the same machine
        calibration = calibration_of(suite, options.samples, seed)
        for place, (entry, setting) in enumerate(settings):
            start = time.perf_counter()
            merged = merge_suite(suite, entry, models, calibration, hyperparameters=setting).model
            seconds[place].append(round(time.perf_counter() - start, 2))
            average = statistics.fmean(evaluate_model(merged, suite, "validation").values())
            recovered[place].append(round((average - base) / (experts - base), 4))
    for (entry, setting), shares, times in zip(settings, recovered, seconds, strict=True):
        label = ", ".join(f"{name}={value:g}" for name, value in setting.items())
        print(f"{options.suite}, {options.samples} samples, {entry} ({label}): {shares}, {times} s", flush=True)
        note(f"{options.suite}, {options.samples} samples, {entry} ({label})", shares, times)


def note(key: str, recovered: list[float], seconds: list[float]) -> None:
    content = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    content[key] = {"recovered": recovered, "seconds": seconds, "environment": environment()}
    PATH.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
