"""Experts as they are shipped: task vectors, uniformly quantised and compressed.

Training the experts would take longer than everything that is shown with them, so they come with the package. A matrix or
kernel is stored as whole multiples of a step proportional to its task vector's standard deviation: most are small, so
that the file's compression brings them to about three bits an element. Vectors (norms, biases) are stored as float16.
The expert is what this file says: all its accuracies are measured after quantisation.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from statsmerge_ext.errors import DataError

_CODES, _STEP, _PLAIN = "codes/", "step/", "plain/"


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
        arrays[_CODES + key] = (task_vector / width).round().to(torch.int8).numpy()
        arrays[_STEP + key] = np.float32(width)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_expert(path: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`write_expert` stored, given the same ``base``.

    Raises DataError for a missing or damaged file, or one that does not fit the base.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for damaged or foreign content
        raise DataError(f"{path}: not a readable expert: {error}") from error
    state = {key: value.clone() for key, value in base.items()}
    for name, array in arrays.items():
        kind, slash, key = name.partition("/")
        kind += slash
        if kind == _STEP:
            continue
        if kind not in (_CODES, _PLAIN) or (kind == _CODES and _STEP + key not in arrays):
            raise DataError(f"{path}: not an expert: unexpected entry {name!r}")
        if key not in state or tuple(state[key].shape) != array.shape:
            expected = tuple(state[key].shape) if key in state else "no such tensor"
            raise DataError(f"{path}: tensor {key!r} has shape {array.shape}, the base has {expected}")
        task_vector = torch.from_numpy(array).float()
        state[key] += task_vector * float(arrays[_STEP + key]) if kind == _CODES else task_vector
    return state
