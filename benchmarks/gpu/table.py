"""Gathers what a run of gpu_check.sh left in a folder: summary.json, and a short table on the screen.

Usage: python -m benchmarks.gpu.table FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from .__main__ import OPERATORS


def load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def stages(folder: Path) -> list[dict[str, Any]]:
    """One line a stage: name, exit code, seconds."""
    path = folder / "stages.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [{"stage": name, "exit_code": int(code), "seconds": int(seconds)} for name, code, seconds in lines]


def describe(row: dict[str, Any]) -> list[str]:
    lines = []
    met = {True: "MET", False: "MISSED", None: "unknown"}[row.get("met")] if row.get("bar") else ""
    bar = f"  bar: {row['bar'][1]} × {row['bar'][0]} {met}" if row.get("bar") else ""
    share = f"  {100 * row['share']:.0f} % of the floor {row['floor_ms']:.3g} ms" if "share" in row else ""
    lines.append(f"{row['operator']}: {row['case']}{share}{bar}")
    for name, result in row["results"].items():
        if "failed" in result:
            lines.append(f"    {name:<20} failed: {result['failed'][:120]}")
            continue
        cold, warm = result["cold"], result["warm"]
        ratio = f"  {row['ratios'][name]:.2f} ×" if name in row.get("ratios", {}) else ""
        lines.append(
            f"    {name:<20} {cold['median']:9.3f} ms cold [{cold['q1']:.3f}, {cold['q3']:.3f}] n={cold['n']},"
            f" {warm['median']:.3f} warm, error {result['error_before']:.1e}/{result.get('error_after', -1):.1e}"
            f"{'' if result['scale'] == 1 else ' (scaled)'}{ratio}"
        )
    return lines


def main(folder: Path) -> None:
    document = {
        "environment": (folder / "environment.txt").read_text() if (folder / "environment.txt").exists() else "",
        "stages": stages(folder),
        "benchmarks": {name: load(folder / f"{name}.json") for name in OPERATORS},
    }
    (folder / "summary.json").write_text(json.dumps(document, indent=1))
    lines = [line for line in document["environment"].splitlines() if re.match(r"(date|commit|gpu|torch|nvcc):", line)]
    for name, benchmark in document["benchmarks"].items():
        if benchmark is None:
            lines.append(f"{name}: no result")
            continue
        ceilings = "  ".join(f"{key} {value / 1e12:.3g} T/s" for key, value in benchmark["ceilings"].items())
        lines.append(f"-- {name}; ceilings of this run: {ceilings}")
        lines += [line for row in benchmark["rows"] for line in describe(row)]
    lines += [f"stage {s['stage']:<24} exit code {s['exit_code']:>3}  {s['seconds']:>4} s" for s in document["stages"]]
    text = "\n".join(lines)
    (folder / "summary.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
