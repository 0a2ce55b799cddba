"""Prints a table of what `nvcc -Xptxas -v` says of every kernel; exits with 1 where one spills that is not allowed to.

Usage: resources.py SOURCE.ARCHITECTURE.log ...
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

# Kernels that may spill, by name, each with its reason.
MAY_SPILL = {"svd::inspect_kernel": "reads every matrix once, before the passes that take the time"}

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def demangled(names: list[str]) -> list[str]:
    """Kernel names as in the source, without arguments; as they are where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    run = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return [
        re.sub(r"^void |\(.*|statsmerge::|cuda::|\(anonymous namespace\)::", "", line)
        for line in run.stdout.split("\n")
    ]


def kernels(log: str) -> list[tuple[str, str, int, int, int, int]]:
    """(name, architecture, registers, shared memory, stack frame, spilled bytes) of every kernel in a log."""
    rows = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", log):
        entry, spills, used = ENTRY.search(part), SPILLS.search(part), USED.search(part)
        if entry and spills and used:
            spilled = int(spills[2]) + int(spills[3])
            rows.append((entry[1], entry[2], int(used[1]), int(used[2] or 0), int(spills[1]), spilled))
    return rows


def main(paths: list[str]) -> int:
    failed = False
    print(f"{'kernel':<72} {'target':>7} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}")
    for path in sorted(paths):
        rows = kernels(Path(path).read_text())
        for name, row in zip(demangled([row[0] for row in rows]), rows):
            kernel = f"{Path(path).name.partition('.')[0]}: {name}"
            print(f"{kernel:<72} {row[1]:>7} {row[2]:>9} {row[3]:>7} {row[4]:>6} {row[5]:>6}")
            if row[5] and name.partition("<")[0] not in MAY_SPILL:
                print(f"{kernel} spills {row[5]} bytes for {row[1]}", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
