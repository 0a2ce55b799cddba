"""Telling models apart without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLES = 4096


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and up to about 4,096 evenly spaced values of every floating-point tensor.

    Cheap enough for models of any size; two fine-tunings of one model never agree in all of those values.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach()
        if not tensor.is_floating_point():  # counters and position tables are not merged, and an expert may lack them
            continue
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous()
        if sample.numel():  # torch cannot view an empty tensor as bytes
            digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
