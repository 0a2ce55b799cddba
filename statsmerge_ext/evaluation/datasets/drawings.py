"""Drawings of a strategy game: its units by people, its map tiles by terrain."""

from __future__ import annotations

import re

import numpy as np

from .images import find_one, read_image
from .packages import Package, PackageStore
from .splits import Dataset, Examples

WESNOTH = Package("deb", ("wesnoth-1.16-data",))

# Peoples of at least six kinds of figures, so that every split has some.
PEOPLES = (
    "drakes dunefolk dwarves elves-wood goblins human-loyalists human-magi human-outlaws monsters nagas orcs saurians "
    "undead"
).split()
# Folders that hold one kind of terrain each; the others hold marks, lights and odds and ends.
TERRAINS = (
    "bridge castle cave chasm flat forest frozen grass hills interior mountains sand unwalkable village walls water"
).split()


def load_drawings(store: PackageStore, folder: str, classes: list[str], words: int) -> Examples:
    """Drawings [N, 64, 64, 3] on white of ``folder``, a subfolder a class; those of one thing are a group.

    A thing is what the first ``words`` of a file's name say; what it does, where it lies, and a number come after them.
    """
    root = find_one(store.path(WESNOTH), f"core/images/{folder}")
    paths = [(label, path) for label, name in enumerate(classes) for path in sorted((root / name).rglob("*.png"))]
    things = [path.parent / "-".join(re.split(r"[-+.\d]", path.name)[:words]) for _, path in paths]
    images = np.stack([read_image(path, "RGB") for _, path in paths])
    labels = np.array([label for label, _ in paths])
    return Examples(images, labels, tuple(classes), np.array([str(thing.relative_to(root)) for thing in things]))


def load_units(store: PackageStore) -> Examples:
    """Figures of thirteen peoples, each in many postures; a kind of figure is a group."""
    return load_drawings(store, "units", PEOPLES, words=1)


def load_terrain(store: PackageStore) -> Examples:
    """Map tiles and their borders, sixteen terrains; a series of tiles is a group."""
    return load_drawings(store, "terrain", TERRAINS, words=2)


units = Dataset("units", (WESNOTH,), load_units)
terrain = Dataset("terrain", (WESNOTH,), load_terrain)
