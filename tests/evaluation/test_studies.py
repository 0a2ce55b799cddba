"""Studies on the tiny suite: every one runs, is resumed, and its table holds what was measured."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from statsmerge_ext import merge
from statsmerge_ext.cli import main
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evaluation.studies import (
    STUDIES,
    Case,
    Records,
    cases,
    get_study,
    plot_study,
    run_study,
    running,
    study_table,
    whole_parts,
)
from statsmerge_ext.evaluation.studies.running import Bench
from statsmerge_ext.evaluation.studies.storage import FORMS, store

FAST = {"epochs": 1}


@pytest.fixture
def quick(tiny, monkeypatch):
    """The tiny suite with one epoch for all that learn, two severities and two budgets."""
    learned = ("stats_merging/layer", "stats_merging/own", "stats_merging/task", "adamerging", "adamerging/plusplus")
    entries = (*learned, "lot+stats_merging", "lot+adamerging", "labelled")
    tiny.hyperparameters.update({name: {**tiny.hyperparameters.get(name, {}), **FAST} for name in entries})
    monkeypatch.setattr(cases, "SEVERITIES", (1, 5))
    monkeypatch.setattr(cases, "BUDGETS", (8, 32))
    return tiny


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs(quick, name, tmp_path, monkeypatch):
    out = tmp_path / "tiny.json"
    study, records = get_study(name), Records(quick, out, limit=30)
    assert not out.exists()
    cases = run_study(study, records, seeds=1, progress=False)
    header, rows = study_table(cases, records)
    assert len(rows) > 1 and len(header) > 1
    assert all(any(row[1:]) for row in rows) and all(any(column) for column in zip(*(row[1:] for row in rows)))
    assert all(0 <= float(cell.split()[0]) <= 100 for row in rows for cell in row[1:] if cell)
    plot_study(header, rows, tmp_path / "study.svg", title=study.title, suite="tiny")
    assert "<svg" in (tmp_path / "study.svg").read_text()

    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("a case was run again"))
    again = Records(quick, out, limit=30)
    assert study_table(run_study(study, again, seeds=1, progress=False), again) == (header, rows)


def test_an_interrupted_study_goes_on(quick, tmp_path, monkeypatch):
    out, measure, done = tmp_path / "tiny.json", Bench.measure, []

    def interrupted(self, case):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(case)
        return measure(self, case)

    study = get_study("start")
    monkeypatch.setattr(Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, Records(quick, out), seeds=2, progress=False)
    monkeypatch.setattr(Bench, "measure", lambda self, case: (done.append(case), measure(self, case))[1])
    cases = run_study(study, Records(quick, out), seeds=2, progress=False)
    assert done == cases and len(cases) == 14
    run_study(study, Records(quick, tmp_path / "whole.json"), seeds=2, progress=False)
    assert out.read_text() == (tmp_path / "whole.json").read_text()


def test_what_was_left_out_is_not_merged(quick, monkeypatch):
    seen, merge_suite = [], running.merge_suite
    monkeypatch.setattr(
        running, "merge_suite", lambda *a, **k: (seen.append((set(a[2][1]), set(a[3]))), merge_suite(*a, **k))[1]
    )
    measured = Bench(Records(quick)).measure(Case("lot", "x", "lot", left_out=("red",), tested=("red",)))
    assert seen == [({"green", "blue"}, {"green", "blue"})]
    assert set(measured) == {"red"}


def test_models_and_evidence_are_made_once_for_cases_that_share_them(quick, monkeypatch):
    grams, merges = [], []
    collect, merge_suite = running.collect_suite_grams, running.merge_suite
    monkeypatch.setattr(running, "collect_suite_grams", lambda *a: (grams.append(1), collect(*a))[1])
    monkeypatch.setattr(running, "merge_suite", lambda *a, **k: (merges.append(a[1]), merge_suite(*a, **k))[1])
    bench = Bench(Records(quick, limit=30))
    for entry in ("regmean", "lot"):
        for severity in (1, 5):
            bench.measure(Case(entry, "contrast", entry, corrupted=("contrast", severity)))
    assert len(grams) == 1 and merges == ["regmean", "lot"]


def test_rounds_of_pairs_are_all_pairs_at_last():
    suite = SimpleNamespace(task_names=tuple("abcdefgh"))
    assert [len(list(cases._pairs(suite, rounds))) for rounds in (1, 2, 3, 4)] == [8, 16, 24, 28]
    assert set(cases._pairs(suite, 4)) == set(itertools.combinations("abcdefgh", 2))
    assert Counter(itertools.chain(*cases._pairs(suite, 1))) == dict.fromkeys("abcdefgh", 2)


def test_predictions_are_those_of_the_learner_that_the_left_out_experts_are_unknown_to(quick):
    bench = Bench(Records(quick))
    case = Case("stats_merging/layer", "x", "stats_merging/layer", left_out=("red",))
    learned, predicted = bench.result(case), bench.result(replace(case, entry="predicted"))
    expected = merge(
        "stats_merging_predict", base=quick.load_base(), experts=bench._experts, learner=learned.learner
    ).coefficients
    assert learned.coefficients["tasks"] == ["green", "blue"] and expected["tasks"] == ["red", "green", "blue"]
    assert torch.equal(predicted.coefficients["values"], expected["values"])
    assert bench.result(case) is learned


def test_records_are_of_what_decides_the_result(quick):
    records = Records(quick)
    case = Case("row", "setting", "stats_merging/layer")
    same = (replace(case, row="x", setting="y"), replace(case, tested=("red",)))
    other = (
        replace(case, seed=1),
        replace(case, samples=8),
        replace(case, left_out=("red",)),
        replace(case, stored="int4"),
        replace(case, corrupted=("contrast", 1)),
        replace(case, limit=10),
        replace(case, calibration_corrupted=("contrast", 1)),
        replace(case, hyperparameters={"r": 2}),
        replace(case, entry="stats_merging/task"),
    )
    assert {records.key(changed) for changed in same} == {records.key(case)}
    assert len({records.key(changed) for changed in (case, *other)}) == 1 + len(other)
    assert Records(quick, limit=3).key(case) != records.key(case)
    data_free = Case("row", "setting", "linear")
    assert records.key(replace(data_free, seed=1, samples=8)) == records.key(data_free)

    records.add(replace(case, tested=("red",)), {"red": 0.5})
    assert records.get(replace(case, tested=("red",))) == {"red": 0.5} and records.get(case) is None
    quick.hyperparameters["stats_merging/layer"] = {"lr": 0.5}
    assert records.get(replace(case, tested=("red",))) is None


def test_the_ceiling_reads_labels_and_nothing_else_does(quick):
    quick.hyperparameters["labelled"] = {"epochs": 30, "lr": 3e-2}
    free = Bench(Records(quick)).result(Case("labelled", "x", "labelled", samples=64))
    training = free.report["training"]
    assert training["last_loss"] < training["first_loss"]
    assert free.report["method"] == "labelled_coefficients"


def test_a_table_has_means_over_a_seed_and_the_range_over_seeds(quick):
    records = Records(quick)
    cases = []
    for seed, low in ((0, 0.5), (1, 0.6)):
        for severity, more in ((1, 0.1), (5, 0.0)):
            case = Case("lot", "8", "lot", seed, corrupted=("contrast", severity), tested=("red", "blue"))
            records.add(case, {"red": low + more, "blue": low + more + 0.2})
            cases.append(case)
    cases.append(Case("ties", "4", "ties"))
    assert study_table(cases, records) == (["", "8", "4"], [["lot", "70.0 ± 5.0", ""], ["ties", "", ""]])
    records.add(cases[-1], dict.fromkeys(("red", "green", "blue"), 0.25))
    assert study_table(cases, records)[1][1] == ["ties", "", "25.0"]


def test_a_study_in_parts_shows_those_that_are_whole(quick):
    records = Records(quick)
    cases = list(get_study("transfer").cases(quick, 1))
    last, unmeasured = cases[-1].part, "stats_merging/layer, predicted"
    for case in cases:
        if not (case.part == last and case.row == unmeasured):
            value = 0.9 if case.part == last else 0.5
            records.add(case, dict.fromkeys(records.tested(case), value))
    assert whole_parts(cases, records) == ["red and green", "green and blue"]
    assert whole_parts(cases, Records(quick)) == []
    rows = {row: cells for row, *cells in study_table(cases, records)[1]}
    assert rows[unmeasured] == rows["stats_merging/layer of the other six"] == ["50.0", "50.0"]


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_stored_in_as_few_bits_as_said(quick, form):
    base = quick.load_base().state_dict()
    experts = {name: quick.load_expert(name) for name in quick.task_names}
    stored, share = store(base, experts, form)
    assert 0 < share <= 1 and stored.keys() == experts.keys()
    worst = max(
        float((value - experts[name][key]).norm() / (experts[name][key] - base[key]).norm())
        for name, state in stored.items()
        for key, value in state.items()
        if value.dim() > 1
    )
    assert worst <= {"float32": 0, "bfloat16": 4e-3, "int8": 2e-2, "int4": 0.2, "int3": 0.5}.get(form, 1)
    assert all(state.keys() == base.keys() for state in stored.values())


def test_the_command_line(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.get_suite", lambda name: quick)
    arguments = ["study", "statistics", "--suite", "tiny", "--seeds=1", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0
    assert "| without sigma " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["statistics-tiny.svg", "tiny.json"]
    assert main(["study", "sample"]) == 2
    assert "did you mean 'samples'?" in capsys.readouterr().err


def test_an_unknown_study():
    with pytest.raises(MethodError, match="unknown study 'sample' .did you mean 'samples'"):
        get_study("sample")
