"""Draw how far the layers of merged models drift from the experts', from what benchmarks/results.py measured.

    python benchmarks/drift_curves.py [--suite vision8] [--row lot --row drift_compensation]

Writes docs/drift_compensation/drift-SUITE.svg, for every suite that was measured.
"""

from __future__ import annotations

import argparse
import json

import matplotlib
from results import RESULTS, ROOT

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.evaluation.report import drift_figure
from statsmerge_ext.evaluation.suites import list_suites

ROWS = ("base", "task_arithmetic", "lot", "regmean_plus_plus", "featcal", "drift_compensation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list_suites(), help="default: all")
    parser.add_argument("--row", action="append", help=f"default: {', '.join(ROWS)}")
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "statsmerge"  # the same picture has the same bytes
    for suite in options.suite or list_suites():
        path = RESULTS / f"{suite}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        figure = drift_figure({name: rows[name]["drift"] for name in options.row or ROWS if name in rows})
        target = ROOT / "docs" / "drift_compensation" / f"drift-{suite}.svg"
        target.parent.mkdir(exist_ok=True)
        with atomic_output(target, overwrite=True) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
