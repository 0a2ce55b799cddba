"""The commands besides merge, their arguments, and how they are used wrongly."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from statsmerge_ext.cli import main
from statsmerge_ext.methods import list_methods


def test_methods_are_listed(capsys):
    assert main(["methods"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{output}" for name in list_methods())
    assert "scaling_factor = 1.2" in output


class TinySuite:
    """A suite of two tasks on the inputs -2, -1, 1, 2; its models are one weight and the heads tell signs."""

    name = "tiny"
    task_names = ("positive", "negative")

    def prepare(self, progress):
        return []

    def load_base(self):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        return model

    def load_expert(self, task):
        return {"weight": torch.ones(1, 1) if task == "positive" else -torch.ones(1, 1)}

    def forward(self, model, batch):
        return model(batch)

    def task(self, name):
        inputs = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        labels = (inputs > 0 if name == "positive" else inputs < 0).long().flatten()
        return SimpleNamespace(batches=lambda split, change: [(inputs, labels)], head=lambda x: torch.cat([-x, x], 1))


@pytest.mark.parametrize(
    ("which", "positive", "negative", "average"),
    [("--base", 1, 0, 0.5), ("--experts", 1, 1, 1), ("--model", 0, 1, 0.5)],
)
def test_evaluate(tmp_path, monkeypatch, capsys, which, positive, negative, average):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.get_suite", lambda name: TinySuite())
    save_file({"weight": -torch.ones(1, 1)}, tmp_path / "m.safetensors")
    model = [str(tmp_path / "m.safetensors")] if which == "--model" else []
    assert main(["evaluate", "tiny", which, *model, "--quiet"]) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in rows.items()} == {
        "positive": positive,
        "negative": negative,
        "average": average,
    }


def test_evaluate_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.get_suite", lambda name: TinySuite())
    save_file({"weight": torch.ones(2, 1)}, tmp_path / "m.safetensors")
    assert main(["evaluate", "tiny", "--model", str(tmp_path / "m.safetensors"), "--quiet"]) == 2
    assert "m.safetensors): tensor 'weight' has shape [2, 1], expected [1, 1]" in capsys.readouterr().err


def test_unknown_suite(capsys):
    assert main(["evaluate", "vision9", "--base", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "vision9" in error


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "statsmerge_ext.evaluation.demo.run_demo", lambda *given, **options: calls.append((given, options))
    )
    assert main(["demo", "tiny", "--out", str(tmp_path), "--methods", "lot", "linear", "--seeds", "3", "--quiet"]) == 0
    assert calls == [((["tiny"], tmp_path), {"methods": ["lot", "linear"], "seeds": 3, "progress": False})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["merge"], "required: RECIPE, OUT"),
        (["merge", "r", "o", "--device", "abacus"], "'abacus' is not a device"),
        (["merge", "r", "o", "--sharding"], "unrecognized arguments: --sharding"),
        (["evaluate", "vision8"], "one of the arguments --model --base --experts is required"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_module_and_version():
    result = subprocess.run(
        [sys.executable, "-m", "statsmerge_ext", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("statsmerge 0.")
