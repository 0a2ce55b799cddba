"""Turn labelled examples into disjoint, class-balanced train, validation and test splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DataError

if TYPE_CHECKING:
    from .packages import Package, PackageStore

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """A data set before it is split.

    inputs: array [N, ...]: images uint8 [N, height, width] or [N, height, width, 3], or texts (dtype str) [N].
    labels: integers [N], indices into `classes`.
    groups: integers [N]: examples of one group (a font, a place, a person) never go to different splits.
    test: None, or booleans [N], constant within a group: the source's own test examples, which then are the test split.
    """

    inputs: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    test: np.ndarray | None = None


@dataclass(frozen=True)
class Split:
    """inputs [N, ...] as in Examples, labels int64 [N], and rows int64 [N]: their places in the source."""

    inputs: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskData:
    """A data set, split. The first examples of the training split go round the classes: a, b, c, a, b, c, …"""

    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def fingerprint(self) -> str:
        """A digest of the classes, labels and places of the examples: changes when others were drawn."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for name in SPLITS:
            split = getattr(self, name)
            digest.update(split.labels.astype("<i8").tobytes() + split.rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SplitSizes:
    """The most examples a split may have; the share of the groups held out for test and validation."""

    train: int
    validation: int
    test: int
    test_share: float = 0.25
    validation_share: float = 0.15


@dataclass(frozen=True)
class Dataset:
    """name, what it is read from, and how: `load(store)` gets the packages' files by `store.path(package)`.

    Raise `version` when `load` changes what it returns: cached splits are then built anew.
    """

    name: str
    packages: tuple[Package, ...]
    load: Callable[[PackageStore], Examples]
    version: int = 1


def make_splits(examples: Examples, sizes: SplitSizes, seed: int = 0) -> TaskData:
    """Split by group, drop exact duplicates, draw evenly from the classes. Deterministic in `seed`.

    Raises DataError when a split would lack a class or the arrays disagree in length.
    """
    inputs, labels = np.asarray(examples.inputs), np.asarray(examples.labels, dtype=np.int64)
    groups = np.asarray(examples.groups)
    if not len(inputs) == len(labels) == len(groups):
        raise DataError(
            f"examples: {len(inputs)} inputs, {len(labels)} labels and {len(groups)} groups; expected as many of each"
        )
    generator = np.random.default_rng(seed)
    part = _assign_groups(groups, examples.test, sizes, generator)
    keep = _first_of_duplicates(inputs)
    splits = {}
    for index, name in enumerate(SPLITS):
        pool = np.flatnonzero(keep & (part == index))
        chosen = _round_robin(generator.permutation(pool), labels, len(examples.classes), getattr(sizes, name))
        missing = set(range(len(examples.classes))) - set(labels[chosen].tolist())
        if missing:
            names = [examples.classes[i] for i in sorted(missing)]
            raise DataError(f"the {name} split has no example of the classes {names}")
        splits[name] = Split(inputs[chosen], labels[chosen], chosen)
    return TaskData(tuple(examples.classes), **splits)


def _assign_groups(groups, test, sizes: SplitSizes, generator) -> np.ndarray:
    """0, 1 or 2 (train, validation, test) an example, constant within a group."""
    names, index = np.unique(groups, return_inverse=True)
    part_of_group = np.zeros(len(names), dtype=np.int8)
    order = generator.permutation(len(names))
    if test is None:
        held_out = max(1, round(sizes.test_share * len(names)))
        part_of_group[order[:held_out]] = 2
        order = order[held_out:]
    else:
        own = np.zeros(len(names), dtype=bool)
        own[index[np.asarray(test, dtype=bool)]] = True
        part_of_group[own] = 2
        order = order[~own[order]]
    part_of_group[order[: max(1, round(sizes.validation_share * len(names)))]] = 1
    return part_of_group[index]


def _first_of_duplicates(inputs: np.ndarray) -> np.ndarray:
    digests = [hashlib.sha1(str(x).encode() if inputs.dtype.kind == "U" else x.tobytes()).digest() for x in inputs]
    keep = np.zeros(len(inputs), dtype=bool)
    keep[np.unique(digests, return_index=True)[1]] = True
    return keep


def _round_robin(pool: np.ndarray, labels: np.ndarray, classes: int, size: int) -> np.ndarray:
    """Up to `size` members of `pool`, class after class in turn until a class runs out."""
    turn = np.empty(len(pool), dtype=np.int64)
    for label in range(classes):
        members = np.flatnonzero(labels[pool] == label)
        turn[members] = np.arange(len(members))
    return pool[np.lexsort((labels[pool], turn))][:size]
