"""Comparing methods on a suite: accuracies, drift, the table, the report, and the demonstration that runs it all."""

from __future__ import annotations

import base64
import io
import json
import re
import statistics

import matplotlib.image
import pytest
import torch
from torch import nn

from statsmerge_ext.cli import main
from statsmerge_ext.engine.merging import merge
from statsmerge_ext.errors import CheckpointError, DataError, MethodError
from statsmerge_ext.evaluation import comparison as comparison_module
from statsmerge_ext.evaluation.comparison import Comparison, Row, calibration_of, compare, load_models, merge_suite
from statsmerge_ext.evaluation.demo import run_demo
from statsmerge_ext.evaluation.drift import feature_drift
from statsmerge_ext.evaluation.report import format_table, table, write_report
from statsmerge_ext.evaluation.run import evaluate_experts, evaluate_model, evaluate_task
from statsmerge_ext.evaluation.suites import Suite
from tests.evaluation.tiny_suite import HYPERPARAMETERS, TASKS, forward, load_base, make_definition

ENTRIES = ("linear", "task_arithmetic", "lot", "stats_merging/task", "stats_merging/layer")
DATA_FREE = ("linear", "task_arithmetic")


@pytest.fixture(scope="module")
def prepared(tiny_assets):
    """The tiny suite, prepared once for all tests that only read it."""
    suite = Suite(make_definition(tiny_assets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATSMERGE_CACHE", str(tiny_assets.parent / "cache"))
        suite.prepare(progress=False)
    return suite


@pytest.fixture(scope="module")
def compared(prepared):
    return compare(prepared, ENTRIES, seeds=2, samples=32, progress=False)


@torch.no_grad()
def accuracy_by_hand(model, suite, name, split="test"):
    task, right, total = suite.task(name), 0, 0
    for images, labels in task.batches(split, batch_size=1):
        features = model(images).flatten()
        cosines = [float(features @ p / features.norm() / p.norm()) for p in task.head.prototypes]
        right += cosines.index(max(cosines)) == int(labels)
        total += 1
    return right / total


# Accuracy


@pytest.mark.parametrize("split", ["validation", "test"])
def test_accuracy_is_the_share_of_right_answers(prepared, split):
    model = load_base()
    accuracies = evaluate_model(model, prepared, split)
    assert accuracies == {name: accuracy_by_hand(model, prepared, name, split) for name in TASKS}
    assert len(set(accuracies.values())) > 1


def test_models_are_evaluated_in_eval_mode_and_left_as_they_were(prepared):
    model = load_base()
    expected = evaluate_task(model, prepared, "red")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    assert evaluate_task(model, prepared, "red") == expected and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_experts_are_evaluated_on_their_own_tasks(prepared):
    accuracies = evaluate_experts(prepared)
    for name in TASKS:
        model = load_base()
        model.load_state_dict(prepared.load_expert(name))
        assert accuracies[name] == accuracy_by_hand(model, prepared, name)


# Drift


def batches_of(suite):
    return {name: next(iter(suite.task(name).batches("validation", 16)))[0] for name in suite.task_names}


def test_an_expert_does_not_drift_from_itself(prepared):
    _, experts = load_models(prepared)
    model = load_base()
    model.load_state_dict(experts["red"])
    drift = feature_drift(model, {"red": experts["red"]}, batches_of(prepared), forward)
    assert drift == {"0.weight": 0.0, "3.weight": 0.0}


@torch.no_grad()
def test_drift_is_the_relative_change_of_a_layers_output(prepared):
    _, experts = load_models(prepared)
    batches = batches_of(prepared)
    base = load_base()
    drift = feature_drift(base, experts, batches, forward)
    assert list(drift) == ["0.weight", "3.weight"]
    expected = {"0.weight": [], "3.weight": []}
    for name, state in experts.items():
        expert = load_base()
        expert.load_state_dict(state)
        base.double(), expert.double()
        for layer, depth in (("0.weight", 1), ("3.weight", 4)):
            ours, theirs = base[:depth](batches[name].double()), expert[:depth](batches[name].double())
            expected[layer].append(float((ours - theirs).norm() / theirs.norm()))
    for layer, changes in expected.items():
        assert 0 < drift[layer] == pytest.approx(statistics.fmean(changes), rel=1e-4)


def test_drift_leaves_the_model_as_it_was(prepared):
    _, experts = load_models(prepared)
    model = load_base()
    feature_drift(model, experts, batches_of(prepared), forward)
    assert all(torch.equal(value, load_base().state_dict()[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_drift_is_measured_before_an_activation_that_works_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
    expert = {key: value + 1.0 for key, value in model.state_dict().items()}
    x = torch.randn(6, 4)
    theirs = x @ expert["0.weight"].T + expert["0.bias"]
    expected = float((model[0](x) - theirs).norm().detach() / theirs.norm())
    drift = feature_drift(model, {"a": expert}, {"a": x}, lambda model, batch: model(batch))
    assert drift["0.weight"] == pytest.approx(expected, rel=1e-5)


# Comparison


def test_rows(compared, prepared):
    assert list(compared.rows) == ["base", "experts", *ENTRIES]
    assert (compared.suite, compared.tasks, compared.seeds, compared.samples) == ("tiny", list(TASKS), 2, 32)
    assert compared.rows["base"].accuracies == [evaluate_model(load_base(), prepared)]
    assert compared.rows["experts"].accuracies == [evaluate_experts(prepared)]
    for row in compared.rows.values():
        assert all(set(accuracies) == set(TASKS) for accuracies in row.accuracies)
        assert all(seconds > 0 for seconds in row.seconds)


def test_methods_that_see_no_data_are_merged_once(compared):
    for entry in ENTRIES:
        runs = 1 if entry in DATA_FREE else 2
        assert len(compared.rows[entry].accuracies) == len(compared.rows[entry].seconds) == runs


def test_a_row_is_what_merging_by_hand_gives(compared, prepared):
    base, experts = load_models(prepared)
    model = merge("task_arithmetic", base=base, experts=experts, **HYPERPARAMETERS["task_arithmetic"]).model
    assert compared.rows["task_arithmetic"].accuracies == [evaluate_model(model, prepared)]
    for seed in range(2):
        calibration = {name: prepared.task(name).calibration(32, seed=seed, batch_size=16) for name in TASKS}
        model = merge(
            "lot", base=base, experts=experts, calibration=calibration, forward=forward, **HYPERPARAMETERS["lot"]
        ).model
        assert compared.rows["lot"].accuracies[seed] == evaluate_model(model, prepared)


def test_hyperparameters_are_the_suites_unless_others_are_given(prepared):
    models = load_models(prepared)
    calibration = calibration_of(prepared, 16)
    own = merge_suite(prepared, "stats_merging/task", models, calibration)
    assert own.report["hyperparameters"].items() >= HYPERPARAMETERS["stats_merging/task"].items()
    given = merge_suite(prepared, "task_arithmetic", models, calibration, hyperparameters={"scaling_factor": 0.0})
    assert all(torch.equal(p, q) for p, q in zip(given.model.parameters(), load_base().parameters(), strict=True))


def test_heads_are_used_in_training(prepared, monkeypatch):
    seen = []

    def spy(*args, heads, **options):
        seen.append(heads)
        return merge(*args, heads=heads, **options)

    monkeypatch.setattr(comparison_module, "merge", spy)
    compare(prepared, ["linear"], samples=8, progress=False)
    assert seen == [{name: prepared.task(name).head for name in TASKS}]


def test_coefficients_and_drift_are_kept(compared):
    for entry in ENTRIES:
        assert list(compared.rows[entry].drift) == ["0.weight", "3.weight"]
        assert all(
            0 < value < compared.rows["base"].drift[layer] * 3 for layer, value in compared.rows[entry].drift.items()
        )
    layer_wise, task_wise = (compared.rows[f"stats_merging/{g}"].coefficients["values"] for g in ("layer", "task"))
    assert layer_wise.shape[1] == len(TASKS) and task_wise.shape[1] == len(TASKS)
    assert not torch.equal(layer_wise, layer_wise[:1].expand_as(layer_wise))
    assert torch.equal(task_wise, task_wise[:1].expand_as(task_wise))
    assert compared.rows["linear"].drift != compared.rows["lot"].drift
    assert compared.rows["experts"].drift == {}


def made_up():
    """Two seeds; base 0.4, experts 0.9, a method at 0.6 and 0.7 on average."""
    rows = {
        "base": Row("base", [{"a": 0.3, "b": 0.5}]),
        "experts": Row("experts", [{"a": 1.0, "b": 0.8}]),
        "x": Row("x", [{"a": 0.5, "b": 0.7}, {"a": 0.7, "b": 0.7}], seconds=[3.0, 1.0]),
        "y": Row("y", [{"a": 0.2, "b": 0.4}], seconds=[0.25], drift={"w": 0.5, "v": 0.25}),
    }
    return Comparison("<made up>", ["a", "b"], 2, 64, rows, notes=["c is left out: 1 < 2"])


def test_averages_spread_and_share_of_the_gap():
    comparison = made_up()
    x = comparison.rows["x"]
    assert x.mean("a") == pytest.approx(0.6) and x.averages() == pytest.approx([0.6, 0.7])
    assert x.average() == pytest.approx(0.65) and x.spread() == pytest.approx(0.05)
    shares = {name: comparison.recovered(row) for name, row in comparison.rows.items()}
    assert shares == pytest.approx({"base": 0.0, "experts": 1.0, "x": 0.5, "y": -0.2})


# Table and report


def test_table():
    header, rows = table(made_up())
    assert header == ["", "a", "b", "average", "gap recovered", "merge s"]
    assert rows == [
        ["base", "30.0", "50.0", "40.0", "0 %", ""],
        ["experts", "100.0", "80.0", "90.0", "100 %", ""],
        ["x", "60.0", "70.0", "65.0 ± 5.0", "50 %", "3.0"],
        ["y", "20.0", "40.0", "30.0", "-20 %", "0.2"],
    ]


def test_table_as_text():
    lines = format_table(made_up()).splitlines()
    assert lines[0] == "|         |     a |    b |    average | gap recovered | merge s |"
    assert lines[1] == "|---------|------:|-----:|-----------:|--------------:|--------:|"
    assert lines[4] == "| x       |  60.0 | 70.0 | 65.0 ± 5.0 |          50 % |     3.0 |"
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1


def images_in(page):
    return [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_report(compared, tmp_path):
    page = write_report([compared], tmp_path / "deep" / "out")
    assert page == tmp_path / "deep" / "out" / "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "results.json"]

    (facts,) = json.loads((page.parent / "results.json").read_text())
    assert facts["suite"] == "tiny" and facts["tasks"] == list(TASKS) and facts["seeds"] == 2
    assert list(facts["rows"]) == list(compared.rows)
    for name, row in compared.rows.items():
        assert facts["rows"][name]["accuracies"] == row.accuracies and facts["rows"][name]["drift"] == row.drift
    coefficients = facts["rows"]["stats_merging/layer"]["coefficients"]
    assert coefficients["tasks"] == list(TASKS) and len(coefficients["values"]) == len(coefficients["names"])
    for row, expected in zip(
        coefficients["values"], compared.rows["stats_merging/layer"].coefficients["values"], strict=True
    ):
        assert row == pytest.approx(expected.tolist(), abs=1e-5)

    text = page.read_text()
    sizes = [matplotlib.image.imread(io.BytesIO(image), format="png").shape[:2] for image in images_in(text)]
    wide, flat = (418, 1210), (286, 1210)
    assert sizes == [
        wide,
        wide,
        flat,
    ]  # accuracies, drift, and the coefficients of the one method that has some a layer
    for cell in (cell for row in table(compared)[1] for cell in row):
        assert f"<td>{cell}" in text


def test_report_shows_names_and_notes_as_text(tmp_path):
    text = write_report([made_up(), made_up()], tmp_path).read_text()
    assert text.count("<h2>&lt;made up&gt;</h2>") == 2 and "c is left out: 1 &lt; 2" in text
    assert len(images_in(text)) == 4


def test_layers_without_coefficients_are_null(tmp_path):
    comparison = made_up()
    values = torch.tensor([[0.1, 0.2], [float("nan")] * 2, [0.3, 1 / 3]])
    comparison.rows["x"].coefficients = {"names": ["u", "v", "w"], "tasks": ["a", "b"], "values": values}
    text = write_report([comparison], tmp_path).read_text()
    (facts,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert facts["rows"]["x"]["coefficients"]["values"] == [[0.1, 0.2], [None, None], [0.3, 0.33333]]
    assert len(images_in(text)) == 3


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_report([made_up()], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(path, *args, **options):
        path.write_bytes(b"<!doc")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_report([made_up(), made_up()], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Demonstration and command line


def test_demo(registered, tmp_path, capsys):
    (comparison,) = run_demo(["tiny"], tmp_path / "out", methods=["linear", "lot"], seeds=2, progress=False)
    output = capsys.readouterr().out
    assert "tiny: test accuracy, %, 64 unlabelled samples a task, 2 seed(s)" in output
    assert format_table(comparison) in output and str(tmp_path / "out" / "report.html") in output
    assert list(comparison.rows) == ["base", "experts", "linear", "lot"]
    assert len(comparison.rows["lot"].accuracies) == 2
    assert len(images_in((tmp_path / "out" / "report.html").read_text())) == 2


def test_demo_runs_every_entry_by_default(registered, tmp_path, monkeypatch):
    monkeypatch.setattr("statsmerge_ext.evaluation.demo.ENTRIES", ("linear", "ties"))
    (comparison,) = run_demo(["tiny"], tmp_path, progress=False)
    assert list(comparison.rows) == ["base", "experts", "linear", "ties"]
    steps = {step for entry in comparison_module.ENTRIES for step in entry.split("+")}
    assert {step.partition("/")[0] for step in steps} == {
        "linear",
        "task_arithmetic",
        "ties",
        "regmean",
        "regmean_plus_plus",
        "tsv_m",
        "iso_c",
        "iso_cts",
        "esm",
        "wudi",
        "swudi",
        "ace",
        "featcal",
        "stats_merging",
        "adamerging",
        "lot",
        "drift_compensation",
    }


def test_demo_repeats_the_notes(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Suite, "prepare", lambda self, progress, prepare=Suite.prepare: [*prepare(self, progress), "x is left out"]
    )
    (comparison,) = run_demo(["tiny"], tmp_path, methods=["linear"], progress=False)
    assert comparison.notes == ["x is left out"] and "x is left out\n|" in capsys.readouterr().out
    assert "<p>x is left out" in (tmp_path / "report.html").read_text()


def test_demo_with_unknown_names(registered, tmp_path):
    with pytest.raises(DataError, match="unknown suite 'tinny'.*did you mean 'tiny'"):
        run_demo(["tinny"], tmp_path / "out", progress=False)
    with pytest.raises(MethodError, match="unknown method 'lott'.*did you mean 'lot'"):
        run_demo(["tiny"], tmp_path / "out", methods=["lott"], progress=False)
    assert not (tmp_path / "out").exists()


def test_demo_from_the_command_line(registered, tmp_path, capsys):
    arguments = ["demo", "tiny", "--out", str(tmp_path / "r"), "--methods", "linear", "lot", "--seeds", "2", "--quiet"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "2 seed(s)" in output and [line.split()[1] for line in output.splitlines() if line.startswith("| ")][1:] == [
        "base",
        "experts",
        "linear",
        "lot",
    ]
    assert (tmp_path / "r" / "report.html").exists() and (tmp_path / "r" / "results.json").exists()


def test_demo_from_the_command_line_takes_all_suites(monkeypatch):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.list_suites", lambda: ["one", "two"])
    calls = []
    monkeypatch.setattr(
        "statsmerge_ext.evaluation.demo.run_demo",
        lambda suites, out, **options: calls.append((suites, str(out), options)),
    )
    assert main(["demo"]) == 0
    assert calls == [(["one", "two"], "demo-report", {"methods": None, "seeds": 1, "progress": True})]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_from_the_command_line(registered, prepared, tmp_path, capsys, split):
    torch.save(prepared.load_expert("green"), tmp_path / "green.pt")
    model = load_base()
    model.load_state_dict(prepared.load_expert("green"))
    for which, expected in {
        ("--base",): evaluate_model(load_base(), prepared, split),
        ("--experts",): evaluate_experts(prepared, split),
        ("--model", str(tmp_path / "green.pt")): evaluate_model(model, prepared, split),
    }.items():
        assert main(["evaluate", "tiny", *which, "--split", split, "--quiet"]) == 0
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
        expected["average"] = statistics.fmean(expected.values())
        assert printed == {name: f"{value:.4f}" for name, value in expected.items()}
