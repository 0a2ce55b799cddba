"""A study's records as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.evaluation.studies.cases import Case
from statsmerge_ext.evaluation.studies.running import Records


def study_table(cases: Sequence[Case], records: Records) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, in percent: the average over a seed's cases, and over seeds ± half their range.

    Cells whose cases have not all been measured are empty; of a study in parts, those that are whole are taken.
    """
    whole = whole_parts(cases, records)
    cases = [case for case in cases if case.part in whole] or cases
    rows, settings = (list(dict.fromkeys(getattr(case, name) for case in cases)) for name in ("row", "setting"))
    cells: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        cells.setdefault((case.row, case.setting), []).append(case)

    def cell(row: str, setting: str) -> str:
        of_cell = cells.get((row, setting), [])
        measured = [records.get(case) for case in of_cell]
        if not measured or None in measured:
            return ""
        by_seed: dict[int, list[float]] = {}
        for case, values in zip(of_cell, measured, strict=True):
            by_seed.setdefault(case.seed, []).append(100 * statistics.fmean(values.values()))
        averages = [statistics.fmean(values) for values in by_seed.values()]
        spread = (max(averages) - min(averages)) / 2
        return f"{statistics.fmean(averages):.1f}" + (f" ± {spread:.1f}" if spread else "")

    return ["", *settings], [[row, *(cell(row, setting) for setting in settings)] for row in rows]


def whole_parts(cases: Sequence[Case], records: Records) -> list[str]:
    """The parts of a study, such as pairs of tasks, of which everything has been measured, in order."""
    missing = {case.part for case in cases if records.get(case) is None}
    return [part for part in dict.fromkeys(case.part for case in cases) if part not in missing]


def plot_study(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path, *, title: str, suite: str) -> None:
    """Write a table of :func:`study_table` as a picture: curves where the settings are numbers, else bars."""
    from matplotlib.figure import Figure

    settings = header[1:]
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    numeric = all(setting.isdigit() for setting in settings)
    width = 0.85 / len(rows)
    for place, (name, *cells) in enumerate(rows):
        points = [(i, float(cell.split()[0])) for i, cell in enumerate(cells) if cell]
        if numeric:
            axes.plot([int(settings[i]) for i, _ in points], [value for _, value in points], marker="o", label=name)
        else:
            axes.bar([i + place * width for i, _ in points], [value for _, value in points], width, label=name)
    if not numeric:
        axes.set_xticks([i + 0.4 for i in range(len(settings))], settings)
    axes.set_xlabel(title)
    axes.set_ylabel(f"{suite}: average test accuracy, %")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    with atomic_output(path, overwrite=True) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
