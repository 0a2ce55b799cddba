"""LOT Merging at fixed scaling factors on vision8's test split: share of the gap recovered, three seeds.

    python benchmarks/lot_scaling.py

Writes benchmarks/results/lot_scaling.json.
"""

from __future__ import annotations

import json
import statistics

from results import RESULTS, environment

from statsmerge_ext.evaluation.comparison import calibration_of, collect_suite_grams, load_models, merge_suite
from statsmerge_ext.evaluation.run import evaluate_experts, evaluate_model
from statsmerge_ext.evaluation.suites import get_suite

SCALING_FACTORS = (1.0, 1.2)
SEEDS = range(3)


def main() -> None:
    suite = get_suite("vision8")
    suite.prepare()
    models = load_models(suite)
    base = statistics.fmean(evaluate_model(models[0], suite).values())
    experts = statistics.fmean(evaluate_experts(suite).values())
    recovered: dict[float, list[float]] = {factor: [] for factor in SCALING_FACTORS}
    for seed in SEEDS:
        calibration = calibration_of(suite, seed=seed)
        evidence = collect_suite_grams(suite, models, calibration)
        for factor in SCALING_FACTORS:
            setting = {"scaling_factor": factor}
            merged = merge_suite(suite, "lot", models, calibration, evidence=evidence, hyperparameters=setting).model
            average = statistics.fmean(evaluate_model(merged, suite).values())
            recovered[factor].append(round((average - base) / (experts - base), 4))
            print(f"seed {seed}, scaling factor {factor}: {recovered[factor][-1]:.1%} of the gap", flush=True)
    content = {"environment": environment(), "suite": suite.name, "recovered": recovered}
    (RESULTS / "lot_scaling.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
