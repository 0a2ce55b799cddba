"""Teachers of another architecture, and their students merged in an expert's place, on a tiny suite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.foreign import RESNET, SUITE, make_student, make_teacher, teacher_accuracy
from statsmerge_ext.evaluation.run import evaluate_task
from statsmerge_ext.evaluation.studies import Records, get_study, run_study, study_table
from statsmerge_ext.evaluation.suites import Suite, get_suite, register_suite
from tests.evaluation.tiny_suite import CLASSES, TASKS, make_definition


@pytest.fixture
def perceptron(tiny, tmp_path):
    """A suite on the tiny suite's data, of another architecture: its base is a perceptron."""

    def load_base():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32)).eval()

    definition = dataclasses.replace(make_definition(tmp_path), name="perceptron", load_base=load_base)
    register_suite(definition)
    suite = get_suite("perceptron")
    suite.prepare(progress=False)
    return suite


def accuracy(suite, state, name):
    model = suite.load_base()
    model.load_state_dict(state)
    return evaluate_task(model, suite, name)


@pytest.mark.parametrize("kind", [SUITE, RESNET])
def test_a_student_learns_its_teachers_task(perceptron, kind):
    name = TASKS[0]
    teacher = make_teacher(kind, perceptron, name)
    assert sorted(teacher.classes) == sorted(CLASSES)
    base = perceptron.load_base().state_dict()
    student, facts = make_student(teacher, perceptron, name)
    assert {key: value.shape for key, value in student.items()} == {key: value.shape for key, value in base.items()}
    assert accuracy(perceptron, student, name) > accuracy(perceptron, base, name) + 0.15
    assert accuracy(perceptron, student, name) > teacher_accuracy(teacher, perceptron, name) - 0.2
    again, _ = make_student(make_teacher(kind, perceptron, name), perceptron, name)
    assert all(torch.equal(value, again[key]) for key, value in student.items())
    assert facts["last"]["agreement"] > facts["first"]["agreement"]


def test_the_accuracy_of_a_teacher_goes_by_the_names_of_its_classes(tiny):
    teacher = make_teacher(SUITE, tiny, "red")
    expert = tiny.load_base()
    expert.load_state_dict(tiny.load_expert("red"))
    assert teacher_accuracy(teacher, tiny, "red") == evaluate_task(expert, tiny, "red")
    turned = dataclasses.replace(
        teacher, classes=CLASSES[::-1], logits=lambda model, batch: teacher.logits(model, batch).flip(-1)
    )
    assert teacher_accuracy(turned, tiny, "red") == teacher_accuracy(teacher, tiny, "red")


def test_a_residual_network_learns_its_task_and_names_its_classes(tiny):
    teacher = make_teacher(RESNET, tiny, "green")
    assert teacher.classes == tuple(sorted(CLASSES)) and not teacher.model.training
    assert teacher_accuracy(teacher, tiny, "green") > 0.7


def test_a_suite_that_was_not_distilled_has_no_teacher(registered, tmp_path):
    suite = Suite(dataclasses.replace(registered, distilled_from=None))
    with pytest.raises(DataError, match="suite tiny: was not distilled from another suite"):
        make_teacher(SUITE, suite, "red")


def test_the_study_merges_a_student_in_its_experts_place(tiny, tmp_path):
    records = Records(tiny, tmp_path / "tiny.json", limit=30)
    header, rows = study_table(run_study(get_study("foreign"), records, seeds=1, progress=False), records)
    assert header[1:] == ["native", "red from resnet", "blue from suite"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["red's teacher"][1] and not cells["red's teacher"][0]
    assert cells["lot"][0] != cells["lot"][1]
    assert all(cells[entry][i] for entry in ("task_arithmetic", "stats_merging/own", "lot") for i in range(3))
