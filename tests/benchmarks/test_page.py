"""From the benchmarks' JSON to the page."""

from __future__ import annotations

import json

import pytest
from page import Ceilings, Measured, draw, fill, milliseconds, operator_table, read_run

WORK = {"read": 3e9, "written": 1e9, "flops": 0.0, "dtype": "float32"}


def entry(group: str, seconds: list[float], **extra_info) -> dict:
    return {"group": group, "stats": {"data": seconds}, "extra_info": extra_info}


def route(seconds: list[float], error: float, work: dict | None = None) -> dict:
    return {"seconds": seconds, "errors": {"error": error}, "work": work}


@pytest.fixture
def run(tmp_path):
    case = {
        "case": "small",
        "caches": "warm",
        "bars": [
            {"peer": "peer", "at_least": 3.0, "towards": None, "of": "seconds"},
            {"peer": "peer", "at_least": 2.0, "towards": 4.0, "of": "error"},
        ],
        "routes": {"statsmerge": route([], 1e-7, WORK), "peer": route([0.4], 2e-7)},
    }
    content = {
        "machine_info": {"threads": 2},
        "commit_info": {"id": "0" * 40, "dirty": False},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [
            entry("ceilings", [0.5, 1.0], ceiling="read", amount=10e9),
            entry("ceilings", [0.5], ceiling="copy", amount=10e9),
            entry("ceilings", [1.0], ceiling="update", amount=40e9),
            entry("ceilings", [1.0], ceiling="float32", amount=100e9),
            entry("gram", [0.1, 0.2, 0.3], **case),
        ],
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return read_run(path)


def test_ceilings_are_the_best_rates(run):
    assert run.ceilings.rates == {"read": 20e9, "copy": 20e9, "update": 40e9, "float32": 100e9}


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        ({"read": 20e9, "written": 0.0, "flops": 0.0, "dtype": "float32"}, 1.0),
        ({"read": 20e9, "written": 20e9, "flops": 0.0, "dtype": "float32"}, 1.0),
        ({"read": 20e9, "written": 0.0, "flops": 300e9, "dtype": "float32"}, 3.0),
        ({"read": 0.0, "written": 0.0, "flops": 100e9, "dtype": "float64"}, 2.0),
        ({"read": 0.0, "written": 0.0, "flops": 100e9, "dtype": "bfloat16"}, 1.0),
    ],
)
def test_floor(run, work, seconds):
    assert run.ceilings.floor(work) == pytest.approx(seconds)


def test_measured_rates_of_other_types_count_where_they_are_better():
    ceilings = Ceilings({"float32": 100.0, "float64": 80.0, "bfloat16": 400.0})
    assert ceilings.arithmetic("float64") == 80.0
    assert ceilings.arithmetic("bfloat16") == 400.0


def test_table(run):
    lines = operator_table({"native": run, "avx2": run}, "gram").splitlines()
    ours, peer = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    timed = ["200 [150, 250]", "", "50%"]
    assert ours == ["**small, warm caches**", "statsmerge", *timed, *timed, "1.0e-07", ""]
    assert peer == [
        "",
        "peer",
        "400",
        "2.00 × ✗",
        "",
        "400",
        "2.00 × ✗",
        "",
        "2.0e-07",
        "≥ 3 ×; ≥ 2 ×, towards 4 × error: 2.00 ×",
    ]


def test_milliseconds_have_three_digits():
    assert milliseconds(Measured([1.23456], {}, None)) == "1 235"
    assert milliseconds(Measured([1.23456e-5], {}, None)) == "0.0123"


def test_fill_replaces_between_markers_only():
    text = "a <!-- x -->old<!-- /x --> b"
    assert fill(text, "x", "new") == "a <!-- x -->\nnew\n<!-- /x --> b"
    with pytest.raises(SystemExit, match="no place for y"):
        fill(text, "y", "new")


def test_plot(run, tmp_path):
    draw({"native": run}, "gram", tmp_path / "gram.svg")
    assert "floor of ours" in (tmp_path / "gram.svg").read_text(encoding="utf-8")
