"""Choose each method's hyperparameters on a suite's validation splits and note them beside the suite's experts.

    python scripts/choose_hyperparameters.py [--suite vision8] [--entry lot]

Every setting of a small grid is merged with the calibration samples of seed 0 and judged by the average accuracy on
validation examples; the test split is never read. The JSON keeps all scores, so that a choice can be checked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.evaluation.comparison import (
    ENTRIES,
    calibration_of,
    collect_suite_grams,
    load_models,
    merge_suite,
    needs_of,
)
from statsmerge_ext.evaluation.run import evaluate_model
from statsmerge_ext.evaluation.suites import get_suite, list_suites
from statsmerge_ext.methods import get_method

# Learning is given few epochs, so that all of a demonstration takes minutes on two cores.
EPOCHS = {
    "vision8": [{"epochs": 12, "lr_step": 10}, {"epochs": 6, "lr_step": 5}],
    "vit8": [{"epochs": 6, "lr_step": 5, "autocast": True}],
    "text8": [{"epochs": 4, "lr_step": 3, "autocast": True}],
}
STATS_MERGING = {"of": ["task_vectors"], "lr": [3e-3, 1e-2], "loss": ["cross_entropy", "kl"]}
OWN = {"of": ["task_vectors"], "shared": [False], "hidden": [32], "lr": [3e-3]}
GRIDS: dict[str, dict[str, list]] = {
    "linear": {},
    "task_arithmetic": {"scaling_factor": [0.1, 0.2, 0.3, 0.5, 0.7]},
    "ties": {"scaling_factor": [0.3, 0.5, 1.0, 1.5, 2.0]},
    "tsv_m": {"scaling_factor": [0.5, 1.0, 1.5, 2.0, 3.0]},
    "iso_c": {"scaling_factor": [0.5, 1.0, 1.5, 2.0, 3.0]},
    "iso_cts": {"scaling_factor": [0.5, 1.0, 1.5, 2.0, 3.0]},
    "wudi": {"scaling_factor": [0.2, 0.3, 0.5, 0.7, 1.0]},
    "swudi": {"scaling_factor": [0.2, 0.5, 1.0, 1.5, 2.0]},
    "ace": {"scaling_factor": [0.5, 1.0, 1.5, 2.0, 3.0]},
    "regmean": {"reduce_non_diagonal_ratio": [0.9, 0.95, 0.99, 1.0]},
    "esm": {"scaling_factor": [0.5, 1.0, 2.0, 3.0, 5.0]},
    "stats_merging/task": {"granularity": ["task"], **STATS_MERGING},
    "adamerging": {"lr": [1e-2, 3e-2]},
    "adamerging/plusplus": {"density": [0.2], "lr": [1e-2, 3e-2]},
    "stats_merging/layer": STATS_MERGING,
    "stats_merging/own": OWN | {"loss": ["cross_entropy", "kl"]},
    "lot": {"scaling_factor": [0.8, 1.0, 1.2, 1.3, 1.5, 2.0]},
    "lot+stats_merging": OWN | {"init_values": [0.0], "loss": ["kl"]},
    "regmean_plus_plus": {"reduce_non_diagonal_ratio": [0.9, 0.95, 0.99, 1.0]},
    "featcal": {"ridge": [0.01, 0.05], "anchor_scale": [2.2, 3.3, 5.0]},
    "drift_compensation": {"ridge": [0.1, 1.0], "scaling_factor": [1.0, 1.5, 2.0]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tunable = [name for name in list_suites() if get_suite(name).definition.tuned_on is None]
    parser.add_argument("--suite", action="append", choices=tunable, help="default: all")
    parser.add_argument("--entry", action="append", choices=ENTRIES, help="default: all")
    options = parser.parse_args()
    for name in options.suite or tunable:
        suite = get_suite(name)
        suite.prepare()
        models, calibration = load_models(suite), calibration_of(suite)
        entries = options.entry or ENTRIES
        needs_grams = any("grams" in needs_of(entry) for entry in entries)
        evidence = collect_suite_grams(suite, models, calibration) if needs_grams else None
        for entry in entries:
            grid = GRIDS[entry]
            scores = []
            for *values, epochs in itertools.product(*grid.values(), EPOCHS[name] if learns(entry) else [{}]):
                setting = dict(zip(grid, values, strict=True)) | epochs
                merged = merge_suite(
                    suite, entry, models, calibration, evidence=evidence, hyperparameters=setting
                ).model
                accuracy = statistics.fmean(evaluate_model(merged, suite, "validation").values())
                scores.append({"setting": setting, "accuracy": round(accuracy, 4)})
                print(name, entry, setting, f"{accuracy:.4f}", flush=True)
            best = max(scores, key=lambda score: score["accuracy"])
            update(suite.assets / "hyperparameters.json", entry, best["setting"])
            update(suite.assets / "validation.json", entry, scores)


def learns(entry: str) -> bool:
    return any("epochs" in get_method(step.partition("/")[0]).hyperparameters for step in entry.split("+"))


def update(path: Path, entry: str, value: object) -> None:
    """Set one entry of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with atomic_output(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps({**content, entry: value}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
