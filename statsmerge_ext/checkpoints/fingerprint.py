"""Telling models apart without comparing all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.compatibility import dtype_of, floating_names, run_of, shape_of

_SAMPLES = 4096
_RUN = 2**22  # elements read at a time


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and up to about 4,096 evenly spaced values of every floating-point tensor.

    Two fine-tunings of one model never agree in all of those values. Counters and position tables are not merged, and
    an expert may lack them: they do not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(floating_names(state)):
        shape, dtype = shape_of(state, name), dtype_of(state, name)
        digest.update(f"{name}:{tuple(shape)}:{dtype};".encode())
        step = max(1, shape.numel() // _SAMPLES)
        length = max(1, _RUN // step) * step
        for start in range(0, shape.numel(), length):
            run = run_of(state, name, start, min(start + length, shape.numel()))
            sample = run[::step].to(dtype).contiguous()  # a checkpoint may give it wider than it is stored
            digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
