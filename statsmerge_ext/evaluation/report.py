"""A comparison as a text table, as JSON, and as one HTML page with its plots."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.evaluation.comparison import Comparison, Row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #1d2733 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } thead { border-bottom: 2px solid #1d2733 }
tbody tr:nth-child(2n) { background: #f3f5f8 } img { max-width: 100% }
"""


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: accuracies in percent, share of the gap recovered, merge seconds."""
    header = ["", *comparison.tasks, "average", "gap recovered", "merge s"]
    rows = []
    for row in comparison.rows.values():
        average = f"{100 * row.average():.1f}"
        if len(row.accuracies) > 1:
            average += f" ± {100 * row.spread():.1f}"
        rows.append(
            [
                row.name,
                *(f"{100 * row.mean(task):.1f}" for task in comparison.tasks),
                average,
                "–" if math.isnan(comparison.recovered(row)) else f"{100 * comparison.recovered(row):.0f} %",
                f"{sorted(row.seconds)[len(row.seconds) // 2]:.1f}" if row.seconds else "",
            ]
        )
    return header, rows


def format_table(comparison: Comparison) -> str:
    """The table in Markdown, aligned so that a terminal shows it well too."""
    return markdown_table(*table(comparison))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of text in Markdown, its columns aligned."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def to_json(comparison: Comparison) -> dict:
    """Everything that was measured, JSON-able."""
    facts = dataclasses.asdict(dataclasses.replace(comparison, rows={}))
    facts["rows"] = {}
    for name, row in comparison.rows.items():
        facts["rows"][name] = {**vars(row), "coefficients": _rounded(row.coefficients)}
    return facts


def write_report(comparisons: Sequence[Comparison], out: Path) -> Path:
    """Write ``results.json`` and ``report.html`` (plots inside) to the folder ``out``; returns the page's path."""
    body = "".join(_section(comparison) for comparison in comparisons)
    contents = {
        "results.json": json.dumps([to_json(comparison) for comparison in comparisons], indent=1) + "\n",
        "report.html": "<!doctype html><html lang=en><meta charset=utf-8><title>Merged models</title>"
        f"<style>{_STYLE}</style><h1>Merged models</h1>{body}</html>\n",
    }
    for name, content in contents.items():
        with atomic_output(out / name, overwrite=True) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return out / "report.html"


def _section(comparison: Comparison) -> str:
    header, rows = table(comparison)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    notes = "".join(f"<p>{html.escape(note)}" for note in comparison.notes)
    plots = [_accuracy_bars(comparison), _drift_curves(comparison)]
    plots += [_heatmap(row) for row in comparison.rows.values() if _varies(row)]
    images = "".join(f'<p><img alt="" src="data:image/png;base64,{plot}">' for plot in plots)
    return (
        f"<h2>{html.escape(comparison.suite)}</h2><p>Test accuracy in percent; {comparison.samples} unlabelled "
        f"calibration samples a task; {comparison.seeds} seed(s), ± half the range.{notes}<table><thead><tr>"
        + "".join(f"<th>{html.escape(cell)}" for cell in header)
        + f"</thead><tbody>{cells}</tbody></table>{images}"
    )


def _accuracy_bars(comparison: Comparison) -> str:
    figure, axes = _figure(11, 3.8)
    groups = [*comparison.tasks, "average"]
    width = 0.85 / len(comparison.rows)
    for place, row in enumerate(comparison.rows.values()):
        heights = [100 * row.mean(task) for task in comparison.tasks] + [100 * row.average()]
        axes.bar([g + place * width for g in range(len(groups))], heights, width, label=row.name)
    axes.set_xticks([g + 0.4 for g in range(len(groups))], groups)
    axes.set_ylabel("test accuracy, %")
    axes.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    return _png(figure)


def _drift_curves(comparison: Comparison) -> str:
    return _png(drift_figure({row.name: row.drift for row in comparison.rows.values() if row.drift}))


def drift_figure(drifts: Mapping[str, Mapping[str, float]]):
    """A matplotlib figure of curves: name -> layer -> feature drift, layers in the order of execution."""
    figure, axes = _figure(11, 3.8)
    for name, drift in drifts.items():
        axes.plot(list(drift.values()), label=name, linewidth=1.3)
    axes.set_xlabel("layer, in order of execution")
    axes.set_ylabel("feature drift  ‖Y − Yₖ‖ / ‖Yₖ‖, mean over tasks")
    axes.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    return figure


def _heatmap(row: Row) -> str:
    coefficients = row.coefficients
    values = coefficients["values"].T.numpy()
    figure, axes = _figure(11, 2.6)
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(coefficients["tasks"])), coefficients["tasks"])
    axes.set_xlabel("layer (blank: no expert changed it)")
    axes.set_title(f"coefficients of {row.name}", fontsize=10)
    figure.colorbar(image, ax=axes)
    return _png(figure)


def _varies(row: Row) -> bool:
    """Whether a row has coefficients that differ between layers."""
    return row.coefficients is not None and bool(row.coefficients["values"].nan_to_num().std(0).max() > 1e-9)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.add_subplot()


def _png(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _rounded(coefficients: dict | None) -> dict | None:
    if coefficients is None:
        return None
    values = [[None if math.isnan(x) else round(x, 5) for x in row] for row in coefficients["values"].tolist()]
    return {**coefficients, "values": values}
