"""Experts as they are shipped: task vectors, uniformly quantised and compressed.

Training the experts would take longer than everything that is shown with them, so they come with the package. A
matrix or kernel is stored as whole multiples of a step proportional to its task vector's standard deviation: most are
small, so that coding them by their frequencies brings them to 2.6 bits (step 0.7) or 3.1 (step 0.5) an element.
Vectors (norms, biases) are stored as float16.

The file is an .npz: ``codes/KEY`` is a raw deflate stream of one signed byte an element, ``step/KEY`` its step,
``plain/KEY`` a vector; ``entries`` lists the others, so that a lost one is noticed.
The expert is what this file says: all its accuracies are measured after quantisation.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.errors import DataError

_CODES, _STEP, _PLAIN, _ENTRIES = "codes/", "step/", "plain/", "entries"


def write_expert(path: Path, base: Mapping[str, Tensor], expert: Mapping[str, Tensor], step: float) -> None:
    """Store ``expert`` as its difference from ``base``, atomically. ``step`` is in standard deviations."""
    arrays = {}
    for key, value in expert.items():
        task_vector = (value - base[key]).contiguous()
        if not value.is_floating_point() or not task_vector.any():
            continue
        if value.dim() < 2:
            arrays[_PLAIN + key] = task_vector.half().numpy()
            continue
        # Never so fine that the largest element would not fit: few elements may hold all of a task vector.
        width = max(step * float(task_vector.std(correction=0)), float(task_vector.abs().max()) / 127)
        arrays[_CODES + key] = _deflate((task_vector / width).round().to(torch.int8).numpy())
        arrays[_STEP + key] = np.float32(width)
    arrays[_ENTRIES] = np.array(sorted(arrays))
    with atomic_output(path, overwrite=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_expert(path: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`write_expert` stored, given the same ``base``.

    Raises DataError for a missing or damaged file, or one that does not fit the base.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for damaged or foreign content
        raise DataError(f"{path}: not a readable expert: {error}") from error
    if arrays.pop(_ENTRIES, np.array([])).tolist() != sorted(arrays):
        raise DataError(f"{path}: not a whole expert: entries are missing or foreign")
    state = {key: value.clone() for key, value in base.items()}
    for name, array in arrays.items():
        kind, slash, key = name.partition("/")
        kind += slash
        if kind == _STEP:
            continue
        if kind not in (_CODES, _PLAIN) or (kind == _CODES and _STEP + key not in arrays):
            raise DataError(f"{path}: not an expert: unexpected entry {name!r}")
        if key not in state:
            raise DataError(f"{path}: has a tensor {key!r}, the base has none")
        values = _inflate(path, key, array) if kind == _CODES else array
        if values.size != state[key].numel() or (kind == _PLAIN and values.shape != tuple(state[key].shape)):
            raise DataError(f"{path}: tensor {key!r} has {values.size} elements, the base's has {state[key].numel()}")
        task_vector = torch.from_numpy(values).float().reshape(state[key].shape)
        state[key] += task_vector * float(arrays[_STEP + key]) if kind == _CODES else task_vector
    return state


def _deflate(codes: np.ndarray) -> np.ndarray:
    """By the bytes' frequencies alone: codes are noise, and a search for repeats costs 15 % in size."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(compressor.compress(codes.tobytes()) + compressor.flush(), np.uint8)


def _inflate(path: Path, key: str, stream: np.ndarray) -> np.ndarray:
    try:
        return np.frombuffer(bytearray(zlib.decompress(stream.tobytes(), -zlib.MAX_WBITS)), np.int8)
    except zlib.error as error:
        raise DataError(f"{path}: tensor {key!r} is damaged: {error}") from error
