"""Each expert's accuracy on its own task with its task vector scaled: what stretching gives, validation splits.

    python benchmarks/expert_scaling.py [--suite vision8]

Writes benchmarks/results/expert_scaling.json.
"""

from __future__ import annotations

import argparse
import json
import statistics

from results import RESULTS, environment

from statsmerge_ext import merge
from statsmerge_ext.evaluation.comparison import load_models
from statsmerge_ext.evaluation.run import evaluate_task
from statsmerge_ext.evaluation.suites import get_suite, list_suites

PATH = RESULTS / "expert_scaling.json"
SCALING_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list_suites(), help="default: vision8")
    options = parser.parse_args()
    content = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    for name in options.suite or ["vision8"]:
        suite = get_suite(name)
        suite.prepare()
        base, experts = load_models(suite)
        averages = {}
        for factor in SCALING_FACTORS:
            scaled = (
                (task, merge("task_arithmetic", base=base, experts={task: expert}, scaling_factor=factor).model)
                for task, expert in experts.items()
            )
            accuracies = [evaluate_task(model, suite, task, "validation") for task, model in scaled]
            averages[factor] = round(statistics.fmean(accuracies), 4)
            print(f"{name}, scaling factor {factor}: {averages[factor]:.1%}", flush=True)
        content[name] = {"environment": environment(), "average": averages}
        PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
