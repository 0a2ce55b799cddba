"""Distillation into another architecture: it learns, it is reproducible, and mismatches are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from statsmerge_ext.cli import main
from statsmerge_ext.distillation.student import StudentTraining, distill
from statsmerge_ext.engine import journal as journals
from statsmerge_ext.errors import CalibrationError, MethodError

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def models():
    """A convolutional teacher whose classes are far apart, and a student of another architecture."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    with torch.no_grad():
        teacher[3].weight *= 10
    student = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 3))
    return teacher, student


@pytest.fixture
def batches():
    return [torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(place)) for place in range(6)]


FAST = StudentTraining(epochs=40, lr=1e-2)


def agreement(teacher, student, batches, order=(0, 1, 2)):
    with torch.no_grad():
        pairs = [(teacher.eval()(b)[:, list(order)].argmax(1), student(b).argmax(1)) for b in batches]
    return float(torch.cat([one == two for one, two in pairs]).float().mean())


def test_a_student_comes_to_agree_with_its_teacher(models, batches):
    teacher, student = models
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trained, facts = distill(teacher, student, batches, training=FAST)
    assert agreement(teacher, trained, batches) > 0.95 > agreement(teacher, student.eval(), batches)
    assert facts["last"]["loss"] < facts["first"]["loss"] and facts["last"]["agreement"] > 0.9
    assert not trained.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    json.dumps(facts)


def test_classes_are_matched_by_their_names(models, batches):
    teacher, student = models
    order = ["cat", "ant", "bee"]
    trained, _ = distill(teacher, student, batches, training=FAST, teacher_classes=CLASSES, student_classes=order)
    assert agreement(teacher, trained, batches, order=[2, 0, 1]) > 0.95


def test_the_loss_is_the_one_that_is_stated(models, batches, monkeypatch):
    teacher, student = models
    seen = []
    monkeypatch.setattr(
        "statsmerge_ext.distillation.student._train",
        lambda student, bridge, loss_of, *_: (student.eval(), bridge, seen.append(loss_of(0)[0]), [{}])[-1],
    )
    training = StudentTraining(alpha=0.3, temperature=2.0, feature_weight=0.5)
    distill(
        teacher,
        student,
        batches,
        training=training,
        teacher_features=lambda model, x: model[:3](x),
        student_features=lambda model, x: model[:2](x),
    )
    torch.manual_seed(0)
    bridge = nn.Linear(32, 128)
    target, logits = teacher(batches[0]), student.eval()(batches[0])
    p, log_q = (target / 2).softmax(1), (logits / 2).log_softmax(1)
    mine, theirs = bridge(student[:2](batches[0])), teacher[:3](batches[0])
    expected = 0.3 * F.cross_entropy(logits, target.argmax(1))
    expected += 0.7 * 4 * (p * (p.log() - log_q)).sum(1).mean()
    expected += 0.5 * (mine - theirs).square().sum() / theirs.square().sum()
    torch.testing.assert_close(seen[0], expected)


def test_an_interrupted_run_taken_up_again_gives_the_same_student(models, batches, tmp_path, monkeypatch):
    teacher, student = models
    training = StudentTraining(epochs=5, lr=1e-2)
    whole, facts = distill(teacher, student, batches, training=training)
    monkeypatch.setattr(journals, "_SECONDS_BETWEEN_SAVES", 0.0)
    journal = journals.Journal(tmp_path / "run.journal", {})
    save, saved = journal.save, []

    def interrupted(state):
        save(state)
        saved.append(state["done"])
        if len(saved) == 9:  # in the middle of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, student, batches, training=training, journal=journal)
    resumed, again = distill(teacher, student, batches, training=training, journal=journal)
    assert saved == list(range(1, 31)) and again == facts
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_a_student_of_a_teacher_without_logits_gives_its_features(models, batches):
    teacher, student = models[0][:3], nn.Sequential(nn.Flatten(), nn.Linear(36, 128))
    options = {
        "teacher_forward": None,
        "teacher_features": lambda model, x: model(x),
        "student_features": lambda model, x: model(x),
    }
    training = StudentTraining(feature_weight=2.0, epochs=60, lr=1e-2)
    trained, facts = distill(teacher, student, batches, training=training, **options)
    with torch.no_grad():
        pairs = [(trained(batch).double(), teacher(batch).double()) for batch in batches]
    losses = [float(2 * (mine - theirs).square().sum() / theirs.square().sum()) for mine, theirs in pairs]
    cosines = [float((F.normalize(mine) * F.normalize(theirs)).sum(1).mean()) for mine, theirs in pairs]
    last = facts["last"]
    assert max(losses) < 0.5 * facts["first"]["loss"] and min(cosines) > 0.9
    assert abs(sum(losses) / 6 - last["loss"]) < 0.05 and abs(sum(cosines) / 6 - last["agreement"]) < 0.02
    with pytest.raises(MethodError, match=r"features have shape \[16, 64\], the teacher's have \[16, 128\]"):
        distill(teacher, nn.Sequential(nn.Flatten(), nn.Linear(36, 64)), batches, training=training, **options)


def test_autocast_runs_the_student_in_bfloat16(models, batches):
    teacher, student = models
    seen = []
    student[4].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    distill(teacher, student, batches[:1], training=StudentTraining(epochs=1, autocast=True))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher_classes": CLASSES}, MethodError, "give both, or neither"),
        ({"teacher_classes": CLASSES, "student_classes": ["ant", "bee", "dog"]}, MethodError, r"lacks \['cat'\]"),
        ({"teacher_classes": CLASSES, "student_classes": ["ant", "ant", "bee"]}, MethodError, "'ant'"),
        ({"teacher_classes": CLASSES[:2], "student_classes": CLASSES[:2]}, MethodError, "2 names for 3 logits"),
        ({"student_batches": []}, CalibrationError, "the loader gave no batch"),
        ({"student_batches": [torch.zeros(2, 1, 6, 6)]}, CalibrationError, "expected 6 as for the teacher, got 1"),
        ({"training": StudentTraining(feature_weight=1.0)}, MethodError, "it needs teacher_features"),
        ({"teacher_forward": None}, MethodError, "feature_weight must be above 0"),
        (
            {"teacher_forward": None, "teacher_classes": CLASSES, "student_classes": CLASSES},
            MethodError,
            "without logits there are no classes",
        ),
        ({"training": StudentTraining(lr=1e30, epochs=3)}, MethodError, "the loss is"),
    ],
)
def test_bad_input(models, batches, options, error, message):
    with pytest.raises(error, match=message):
        distill(*models, batches, **options)


def test_output_sizes_that_differ_are_refused(models, batches):
    teacher, student = models
    student[4] = nn.Linear(32, 5)
    with pytest.raises(MethodError, match=r"its logits have shape \[16, 5\], the teacher's have \[16, 3\]"):
        distill(teacher, student, batches)


def test_labels_are_refused(models, batches):
    with pytest.raises(CalibrationError, match="label"):
        distill(*models, [{"x": batches[0], "labels": torch.zeros(16)}])


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"alpha": 2.0}, "alpha"), ({"temperature": 0.0}, "temperature"), ({"epochs": 0}, "epochs")],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(MethodError, match=message):
        StudentTraining(**setting)


@pytest.fixture
def directory(tmp_path):
    """A ResNet and a ViT with the same classes in another order, and images."""
    torch.manual_seed(0)
    labels = dict(enumerate(CLASSES))
    resnet = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels
    )
    vit = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_channels=1,
        id2label=dict(enumerate(reversed(CLASSES))),
    )
    ResNetForImageClassification(resnet).save_pretrained(tmp_path / "teacher")
    ViTForImageClassification(vit).save_pretrained(tmp_path / "student")
    np.savez(tmp_path / "images.npz", pixel_values=np.random.default_rng(0).normal(size=(40, 1, 16, 16)).astype("f4"))
    return tmp_path


def distill_on_disk(directory, *options):
    paths = {"teacher": "teacher", "student": "student", "data": "images.npz", "out": "out"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(directory / path))]
    return main(["distill", *arguments, "--quiet", "--samples=32", "--batch-size=8", *options])


@pytest.mark.parametrize("feature_weight", ["0", "0.5"])
def test_the_command_line(directory, feature_weight):
    options = ["--epochs=30", "--lr=3e-3", "--temperature=2", f"--feature-weight={feature_weight}"]
    assert distill_on_disk(directory, *options) == 0
    report = json.loads((directory / "out" / "distillation_report.json").read_text())
    assert report["last"]["loss"] < report["first"]["loss"] and report["settings"]["temperature"] == 2
    student = AutoModelForImageClassification.from_pretrained(directory / "out")
    teacher = AutoModelForImageClassification.from_pretrained(directory / "teacher").eval()
    assert [student.config.id2label[i] for i in range(3)] == list(reversed(CLASSES))
    images = torch.from_numpy(np.load(directory / "images.npz")["pixel_values"])
    with torch.no_grad():
        theirs, mine = teacher(images).logits.argmax(1), 2 - student(images).logits.argmax(1)
    assert (theirs == mine).float().mean() > 0.8
    assert not (directory / "out.journal").exists()


def test_classes_that_do_not_match_leave_nothing_behind(directory, capsys):
    config = json.loads((directory / "student" / "config.json").read_text())
    config["id2label"]["0"] = "dog"
    (directory / "student" / "config.json").write_text(json.dumps(config))
    assert distill_on_disk(directory) == 2
    assert "the student lacks ['cat'], and has ['dog'] besides" in capsys.readouterr().err
    assert sorted(path.name for path in directory.iterdir()) == ["images.npz", "student", "teacher"]
