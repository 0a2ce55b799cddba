"""The GPU benchmarks without a GPU: the script's list of stages, and every case with small tensors on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = ["topk_svd", "gram", "layer_solve", "weighted_merge"]


def run(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_dry_run_lists_the_stages():
    lines = run("benchmarks/gpu_check.sh", "--dry-run").splitlines()
    assert {line.split()[0] for line in lines} == {"build", "tests", *OPERATORS, "memcheck", "racecheck"}
    assert [line.split()[0] for line in run("benchmarks/gpu_check.sh", "--dry-run", "mem").splitlines()] == ["memcheck"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_runs_and_is_right(tmp_path, operator):
    run(sys.executable, "-m", "benchmarks.gpu", operator, "--device", "cpu", "--tiny", "--out", str(tmp_path))
    document = json.loads((tmp_path / f"{operator}.json").read_text())
    assert document["ceilings"]["copy_bytes"] > 0 and document["rows"]
    for row in document["rows"]:
        for name, result in row["results"].items():
            assert "failed" not in result, (row["case"], name, result)
            assert result["error_before"] < 2e-2 and result["error_after"] < 2e-2, (row["case"], name, result)
            assert result["warm"]["median"] > 0 and result["cold"]["n"] == 2
    table = run(sys.executable, "-m", "benchmarks.gpu.table", str(tmp_path))
    assert all(row["case"] in table for row in document["rows"])
    assert (tmp_path / "summary.json").exists() and (tmp_path / "summary.txt").read_text() == table
