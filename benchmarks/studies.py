"""Measure what is missing of the studies of docs/studies.md; make its tables and plots from all that was measured.

    python benchmarks/studies.py [--suite vision8] [--study labels] [--seeds 3] [--report]

Keeps all that was measured in benchmarks/results/studies/SUITE.json; writes the tables between the markers of
docs/studies.md and the plots to docs/studies/. A study in which nothing was measured has no place there.
"""

from __future__ import annotations

import argparse

from results import RESULTS, ROOT, environment, measured, put

from statsmerge_ext.evaluation.report import markdown_table
from statsmerge_ext.evaluation.studies import STUDIES, Records, Study, plot_study, run_study, study_table, whole_parts
from statsmerge_ext.evaluation.suites import get_suite
from statsmerge_ext.memory import keep_freed_memory

PAGE = ROOT / "docs" / "studies.md"
#: suite -> study -> seeds: as many as some hours of one processor core allow.
PLAN = {
    "vision8": {
        "labels": 3,
        "start": 1,
        "quantisation": 1,
        "transfer": 4,
        "robustness": 1,
        "samples": 1,
        "statistics": 1,
        "unseen": 1,
        "tasks": 1,
        "robust_calibration": 1,
        "closed_forms": 3,
    },
    "vit8": {"labels": 3, "closed_forms": 3, "foreign": 3},
    "vision4": {"closed_forms": 3},
    "text8": {"labels": 3, "start": 1, "quantisation": 1, "statistics": 1, "samples": 1, "closed_forms": 3},
}


def report(study: Study, records: Records, seeds: int) -> None:
    """Write the study's table and plot."""
    suite = records.suite.name
    cases = list(study.cases(records.suite, seeds))
    header, rows = study_table(cases, records)
    if not any(cell for _, *cells in rows for cell in cells):
        return
    picture = f"studies/{study.name}-{suite}.svg"
    plot_study(header, rows, PAGE.parent / picture, title=study.title, suite=suite)
    parts = whole_parts(cases, records)
    spread = f"{seeds} seeds, ± half their range" if seeds > 1 else "one seed"
    if len(parts) > 1:
        spread = f"one seed, {len(parts)} pairs"
    when = measured(records.studies[study.name])
    caption = f"{suite}, {study.title}: average test accuracy in percent, {spread}. {when}"
    put(PAGE, f"{study.name}-{suite}", f"{caption}\n\n{markdown_table(header, rows)}\n\n![]({picture})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=PLAN, help="default: all")
    parser.add_argument("--study", action="append", choices=STUDIES, help="default: all that are planned")
    parser.add_argument("--seeds", type=int, help="default: as planned")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    keep_freed_memory()
    for name in options.suite or PLAN:
        suite = get_suite(name)
        suite.prepare()
        records = Records(suite, RESULTS / "studies" / f"{name}.json")
        for study, planned in PLAN[name].items():
            if options.study and study not in options.study:
                continue
            seeds = options.seeds or planned
            if not options.report:
                records.studies[study] = environment()
                run_study(STUDIES[study], records, seeds=seeds)
            if study in records.studies:
                report(STUDIES[study], records, seeds)


if __name__ == "__main__":
    main()
