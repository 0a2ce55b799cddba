"""Studies on the tiny suite: every one runs, is resumed, and its table holds what was measured."""

from __future__ import annotations

import json

import pytest

from statsmerge_ext.cli import main
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evaluation import studies
from statsmerge_ext.evaluation.studies import STUDIES, Case, get_study, run_study, study_table

FAST = {"epochs": 1}


@pytest.fixture
def quick(tiny, monkeypatch):
    """The tiny suite with one epoch for all that learn, and two severities."""
    entries = ("stats_merging/layer", "stats_merging/task", "adamerging")
    tiny.hyperparameters.update({name: {**tiny.hyperparameters.get(name, {}), **FAST} for name in entries})
    monkeypatch.setattr(studies, "SEVERITIES", (1, 5))
    return tiny


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs(quick, name, tmp_path, monkeypatch):
    out = tmp_path / "study.json"
    results = run_study(get_study(name), quick, out, seeds=1, limit=30, progress=False)
    assert json.loads(out.read_text()) == results
    header, rows = study_table(results)
    assert len(rows) > 1 and len(header) > 1
    assert all(cell and 0 <= float(cell.split()[0]) <= 100 for row in rows for cell in row[1:])
    studies.plot_study(results, tmp_path / "study.svg")
    assert "<svg" in (tmp_path / "study.svg").read_text()

    monkeypatch.setattr(studies._Bench, "accuracies", lambda *_: pytest.fail("a case was run again"))
    assert run_study(get_study(name), quick, out, seeds=1, limit=30, progress=False) == results


def test_an_interrupted_study_goes_on(quick, tmp_path, monkeypatch):
    out, run, done = tmp_path / "study.json", studies._Bench.accuracies, []

    def accuracies(self, case, limit):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(case)
        return run(self, case, limit)

    study = get_study("labels")
    monkeypatch.setattr(studies._Bench, "accuracies", accuracies)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, quick, out, seeds=2, progress=False)
    monkeypatch.setattr(studies._Bench, "accuracies", lambda *arguments: (done.append(1), run(*arguments))[1])
    results = run_study(study, quick, out, seeds=2, progress=False)
    assert len(done) == len(results["records"]) == 6
    whole = run_study(study, quick, tmp_path / "whole.json", seeds=2, progress=False)
    assert whole == results


def test_unseen_tasks_are_not_merged(quick, monkeypatch):
    seen = []
    merge_suite = studies.merge_suite
    monkeypatch.setattr(
        studies, "merge_suite", lambda *a, **k: (seen.append((set(a[2][1]), set(a[3]))), merge_suite(*a, **k))[1]
    )
    bench = studies._Bench(quick)
    accuracies = bench.accuracies(Case("lot", "x", "lot", unseen=("red",), tested=("red",)), None)
    assert seen == [({"green", "blue"}, {"green", "blue"})]
    assert set(accuracies) == {"red"}


def test_models_and_evidence_are_made_once_for_cases_that_share_them(quick, monkeypatch):
    grams, merges = [], []
    collect, merge_suite = studies.collect_suite_grams, studies.merge_suite
    monkeypatch.setattr(studies, "collect_suite_grams", lambda *a: (grams.append(1), collect(*a))[1])
    monkeypatch.setattr(studies, "merge_suite", lambda *a, **k: (merges.append(a[1]), merge_suite(*a, **k))[1])
    bench = studies._Bench(quick)
    for entry in ("regmean", "lot"):
        for severity in (1, 5):
            bench.accuracies(Case(entry, "contrast", entry, corrupted=("contrast", severity)), 30)
    assert len(grams) == 1 and merges == ["regmean", "lot"]


def test_the_ceiling_reads_labels_and_nothing_else_does(quick):
    bench = studies._Bench(quick)
    quick.hyperparameters["adamerging"] = {"epochs": 30, "lr": 3e-2}
    free = bench._merge(Case("labelled", "x", "labelled", samples=64))
    training = free.report["training"]
    assert training["last_loss"] < training["first_loss"]
    assert free.report["method"] == "labelled_coefficients"


def test_a_table_has_means_and_spreads():
    record = {"row": "lot", "setting": "8"}
    records = {"a": {**record, "accuracies": {"x": 0.5, "y": 0.7}}, "b": {**record, "accuracies": {"x": 0.6, "y": 0.8}}}
    records["c"] = {"row": "ties", "setting": "4", "accuracies": {"x": 0.25}}
    assert study_table({"records": records}) == (["", "8", "4"], [["lot", "65.0 ± 5.0", ""], ["ties", "", "25.0"]])


def test_the_command_line(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.get_suite", lambda name: quick)
    arguments = ["study", "statistics", "--suite", "tiny", "--seeds=1", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0
    assert "| without sigma |" in capsys.readouterr().out.replace("  ", " ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["statistics-tiny.json", "statistics-tiny.svg"]
    assert main(["study", "sample"]) == 2
    assert "did you mean 'samples'?" in capsys.readouterr().err


def test_an_unknown_study():
    with pytest.raises(MethodError, match="unknown study 'sample' .did you mean 'samples'"):
        get_study("sample")
