"""Suites: prepared without a network, heads, calibration data, and experts as they are stored and shipped."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from statsmerge_ext.errors import CheckpointError, DataError
from statsmerge_ext.evaluation.datasets import packages
from statsmerge_ext.evaluation.run import evaluate_task
from statsmerge_ext.evaluation.suites import Suite, get_suite, list_suites, register_suite
from statsmerge_ext.evaluation.suites.assets import read_expert, write_expert
from statsmerge_ext.evaluation.suites.suite import PrototypeHead
from tests.evaluation.tiny_suite import CLASSES, NPM, SIZES, TASKS, load_base, make_dataset, make_definition


def rows_of(batches):
    """The images of batches, each as bytes."""
    return [image.numpy().tobytes() for batch in batches for image in batch]


def images_of(task, split):
    return rows_of(batch for batch, _ in task.batches(split))


# The registry


def test_unknown_suite(registered):
    assert get_suite("tiny").definition is registered and "tiny" in list_suites()
    with pytest.raises(DataError, match=r"unknown suite 'vison8' \(did you mean 'vision8'\?\); known: vision8, .*tiny"):
        get_suite("vison8")


def test_a_name_is_registered_once(registered, tmp_path):
    register_suite(registered)
    with pytest.raises(DataError, match="a suite named 'tiny' is already registered"):
        register_suite(make_definition(tmp_path))


def test_hyperparameters_of_another_suite(registered, tmp_path):
    register_suite(dataclasses.replace(registered, name="untuned", assets=tmp_path, tuned_on="tiny"))
    assert get_suite("untuned").hyperparameters == get_suite("tiny").hyperparameters != {}


# Preparing


def test_nothing_is_there_before_preparing(registered):
    suite = get_suite("tiny")
    for use in (lambda: suite.task_names, lambda: suite.task("red")):
        with pytest.raises(DataError, match=r"suite tiny: call prepare\(\) first"):
            use()


def test_tasks(tiny):
    assert tiny.task_names == TASKS
    assert tiny.task("red").name == "red" and tiny.task("red").classes == CLASSES
    with pytest.raises(
        DataError, match=r"suite tiny has no task 'gren' \(did you mean 'green'\?\); it has red, green, blue"
    ):
        tiny.task("gren")


def test_preparing_again_reads_the_cache(registered, monkeypatch):
    get_suite("tiny").prepare(progress=False)
    monkeypatch.setattr(np.random, "default_rng", lambda *seed: pytest.fail("the data was made anew"))
    suite = get_suite("tiny")
    assert suite.prepare(progress=False) == [] and suite.task_names == TASKS


def test_a_task_without_its_client_is_left_out(tiny_assets, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    suite = Suite(make_definition(tiny_assets, (make_dataset("red"), make_dataset("green", NPM), make_dataset("blue"))))
    (note,) = suite.prepare(progress=False)
    assert note == "green is left out: data set green: npm: tiny-data@1.0.0: npm is not installed"
    assert suite.task_names == ("red", "blue")
    with pytest.raises(DataError, match="has no task 'green'"):
        suite.task("green")


def test_no_task_left(tiny_assets, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    suite = Suite(make_definition(tiny_assets, (make_dataset("green", NPM),)))
    with pytest.raises(DataError, match="suite tiny: no task is available; green is left out: .*npm is not installed"):
        suite.prepare(progress=False)
    with pytest.raises(DataError, match="call prepare"):
        suite.task("green")


def test_broken_content_is_no_reason_to_leave_a_task_out(tiny_assets):
    def load(store):
        raise KeyError("column")

    broken = dataclasses.replace(make_dataset("green"), load=load)
    suite = Suite(make_definition(tiny_assets, (make_dataset("red"), broken)))
    with pytest.raises(DataError, match="data set green: .*does not hold the expected files"):
        suite.prepare(progress=False)


def test_data_that_the_expert_was_not_trained_on_is_noted(tiny_assets, tmp_path):
    facts = json.loads((tiny_assets / "provenance.json").read_text())
    facts["tasks"]["green"]["data"] = "0" * 16
    (tmp_path / "provenance.json").write_text(json.dumps(facts))
    notes = Suite(make_definition(tmp_path)).prepare(progress=False)
    assert notes == ["green: its data differs from what its expert was trained on"]


def test_a_damaged_provenance_file(tmp_path):
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(DataError, match=r"provenance\.json: not readable as JSON"):
        Suite(make_definition(tmp_path)).prepare(progress=False)


def test_a_suite_without_experts_yet(tmp_path):
    suite = Suite(make_definition(tmp_path / "none"))
    assert suite.prepare(progress=False) == [] and suite.provenance == suite.hyperparameters == {}
    with pytest.raises(DataError, match="red.npz: not a readable expert"):
        suite.load_expert("red")


# Data and heads


def test_splits_are_disjoint(tiny):
    for name in TASKS:
        task = tiny.task(name)
        splits = {split: images_of(task, split) for split in ("train", "validation", "test")}
        assert [len(rows) for rows in splits.values()] == [SIZES.train, SIZES.validation, SIZES.test]
        assert len(set().union(*splits.values())) == SIZES.train + SIZES.validation + SIZES.test


def test_batches_are_the_split_in_order(tiny):
    task = tiny.task("red")
    batches = list(task.batches("test", batch_size=40))
    assert [tuple(images.shape) for images, _ in batches] == [(40, 1, 8, 8), (40, 1, 8, 8), (10, 1, 8, 8)]
    assert all(len(images) == len(labels) and labels.dtype == torch.int64 for images, labels in batches)
    ((images, labels),) = task.batches("test", batch_size=1000)
    assert torch.equal(torch.cat([i for i, _ in batches]), images) and torch.equal(
        torch.cat([y for _, y in batches]), labels
    )


def test_calibration_has_no_labels(tiny):
    batches = tiny.task("red").calibration(samples=40, batch_size=16)
    assert [type(batch) for batch in batches] == [torch.Tensor] * 3
    assert [tuple(batch.shape) for batch in batches] == [(16, 1, 8, 8), (16, 1, 8, 8), (8, 1, 8, 8)]
    assert all(batch.is_floating_point() for batch in batches)


def test_calibration_is_drawn_from_the_training_split(tiny):
    task = tiny.task("green")
    train = set(images_of(task, "train"))
    held_out = set(images_of(task, "validation")) | set(images_of(task, "test"))
    everything = rows_of(task.calibration(samples=SIZES.train))
    assert set(everything) == train and len(everything) == SIZES.train
    for seed in range(3):
        drawn = rows_of(task.calibration(samples=64, seed=seed))
        assert len(set(drawn)) == 64 and set(drawn) <= train and not set(drawn) & held_out


def test_calibration_depends_on_the_seed(tiny):
    task = tiny.task("red")
    one, two, other = (rows_of(task.calibration(samples=32, seed=seed)) for seed in (1, 1, 2))
    assert one == two and set(one) != set(other)


@pytest.mark.parametrize("samples", [0, -1, SIZES.train + 1])
def test_calibration_of_too_many_samples(tiny, samples):
    with pytest.raises(DataError, match=f"task red: samples: expected 1 to {SIZES.train}, got {samples}"):
        tiny.task("red").calibration(samples=samples)


def test_prototype_head_is_the_scaled_cosine_to_class_means(tiny):
    task, model = tiny.task("blue"), load_base().double()
    ((images, labels),) = task.batches("train", batch_size=1000)
    shots = {c: [] for c in range(len(CLASSES))}
    for image, label in zip(images, labels.tolist(), strict=True):
        if len(shots[label]) < tiny.definition.shots:
            feature = model(image[None].double()).flatten()
            shots[label].append(feature / feature.norm())
    means = [torch.stack(features).mean(0) for features in shots.values()]
    ((images, _),) = task.batches("test", batch_size=1000)
    features = model(images.double()).flatten(1)
    expected = torch.stack([torch.stack([20.0 * (f @ m) / (f.norm() * m.norm()) for m in means]) for f in features])
    with torch.no_grad():
        logits = task.head(tiny.forward(tiny.load_base(), images))
    assert logits.shape == (SIZES.test, len(CLASSES))
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


def test_head_is_frozen_but_lets_gradients_through():
    head = PrototypeHead(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), 2.0)
    features = torch.tensor([[3.0, 4.0]], requires_grad=True)
    logits = head(features)
    torch.testing.assert_close(logits, torch.tensor([[1.2, 1.6]]))
    logits[0, 0].backward()
    torch.testing.assert_close(features.grad, torch.tensor([[2 * 0.128, -2 * 0.096]]))
    assert list(head.parameters()) == []


# Experts as they are stored


def make_expert(base, scale=0.02):
    generator = torch.Generator().manual_seed(0)
    return {
        key: value + scale * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value.clone()
        for key, value in base.items()
    }


@pytest.mark.parametrize("step", [0.25, 0.5, 2.0])
def test_a_stored_expert_is_off_by_half_a_step(tmp_path, step):
    base = load_base().state_dict()
    expert = make_expert(base)
    expert["3.weight"] = base["3.weight"].clone()
    write_expert(tmp_path / "deep" / "x.npz", base, expert, step)
    read = read_expert(tmp_path / "deep" / "x.npz", base)
    assert list(read) == list(base)
    for key, value in expert.items():
        task_vector = value - base[key]
        if key == "3.weight" or not value.is_floating_point():
            assert torch.equal(read[key], base[key])
        elif value.dim() < 2:
            assert torch.equal(read[key], base[key] + task_vector.half().float())
        else:
            error = (read[key] - value).abs().max()
            assert error <= step / 2 * task_vector.std() * 1.01 and (error > 0.3 * step * task_vector.std())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.npz"]


@pytest.mark.parametrize("change", ["one element", "constant", "single", "nearly constant"])
def test_task_vectors_of_unusual_spread_survive(tmp_path, change):
    base = {"w": torch.zeros(1, 1) if change == "single" else torch.zeros(200, 200)}
    expert = {"w": base["w"].clone()}
    if change == "one element":
        expert["w"][3, 5] = 2.0
    else:
        expert["w"] += 0.3 if change != "nearly constant" else 0.3 + 1e-4 * torch.randn(200, 200)
    write_expert(tmp_path / "x.npz", base, expert, 0.5)
    assert (read_expert(tmp_path / "x.npz", base)["w"] - expert["w"]).abs().max() <= expert[
        "w"
    ].abs().max() / 254 * 1.01


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    base = load_base().state_dict()
    write_expert(tmp_path / "x.npz", base, make_expert(base), 0.5)
    before = (tmp_path / "x.npz").read_bytes()

    def refuse(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(CheckpointError, match="no space left"):
        write_expert(tmp_path / "x.npz", base, make_expert(base, 1.0), 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"] and (tmp_path / "x.npz").read_bytes() == before


def test_a_damaged_expert_never_passes(tmp_path):
    base = load_base().state_dict()
    path = tmp_path / "x.npz"
    write_expert(path, base, make_expert(base), 0.5)
    good, expected = path.read_bytes(), read_expert(path, base)
    refused = 0
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"x\.npz: not a readable expert"):
            read_expert(path, base)
    for place in np.random.default_rng(0).choice(good.index(b"PK\x01\x02"), 200, replace=False):  # where the arrays are
        damaged = bytearray(good)
        damaged[place] ^= 0x14
        path.write_bytes(damaged)
        try:
            read = read_expert(path, base)
        except DataError:
            refused += 1
        else:
            assert all(torch.equal(read[key], expected[key]) for key in base)
    assert refused > 100  # the others were flips of what no reader looks at, such as dates


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"codes/0.weight": np.zeros((8, 1, 3, 3), np.int8)}, "not an expert: unexpected entry 'codes/0.weight'"),
        ({"weights": np.zeros(3)}, "not an expert: unexpected entry 'weights'"),
        ({"0.bias": np.zeros(8)}, "not an expert: unexpected entry '0.bias'"),
        ({"plain/0.bias": np.zeros(9)}, "tensor '0.bias' has 9 elements, the base's has 8"),
        ({"codes/0.weight": np.full(9, 255, np.uint8), "step/0.weight": np.ones(())}, "tensor '0.weight' is damaged"),
        ({"plain/7.bias": np.zeros(9)}, "has a tensor '7.bias', the base has none"),
    ],
)
def test_a_foreign_expert_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays, entries=np.array(sorted(arrays)))
    with pytest.raises(DataError, match=message):
        read_expert(tmp_path / "x.npz", load_base().state_dict())


def test_an_array_is_no_expert(tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="not a readable expert"):
        read_expert(tmp_path / "x.npz", {})


def test_experts_made_by_the_script(tiny, tiny_assets):
    base, facts = load_base().state_dict(), tiny.provenance
    assert list(facts["tasks"]) == list(TASKS) and facts["training"]["lr"] == 1e-2
    for name, fact in facts["tasks"].items():
        expert = tiny.load_expert(name)
        model = load_base()
        model.load_state_dict(expert)
        for split, accuracy in fact["accuracy"].items():
            assert evaluate_task(model, tiny, name, split) == accuracy["expert"] >= accuracy["base"] + 0.1
        for key in base:  # fine-tuning leaves the statistics of BatchNorm alone
            assert torch.equal(expert[key], base[key]) == ("running" in key or "num_batches" in key), key
        assert fact["bytes"] == (tiny_assets / f"{name}.npz").stat().st_size
