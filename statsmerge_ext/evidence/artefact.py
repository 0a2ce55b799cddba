"""Evidence on disk: one safetensors file whose header says what it is and where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from statsmerge_ext.checkpoints import Checkpoint, open_checkpoint, save_state_dict
from statsmerge_ext.errors import CalibrationError

_SAMPLES = 4096


def save_artefact(path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: dict) -> None:
    """Write ``tensors`` and the JSON-able ``facts``, atomically; an older artefact there is replaced.

    Raises CheckpointError when it cannot be written.
    """
    save_state_dict(tensors, path, metadata={"format": kind, "facts": json.dumps(facts)}, overwrite=True)


def load_artefact(path: str | Path, kind: str) -> tuple[Checkpoint, dict]:
    """The tensors and facts that :func:`save_artefact` wrote.

    Raises CheckpointError for an unreadable file, CalibrationError for a readable one of another ``kind``.
    """
    file = open_checkpoint(path)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata() or {}
    if metadata.get("format") != kind:
        raise CalibrationError(f"{path}: expected a file of format {kind!r}, found {metadata.get('format')!r}")
    return file, json.loads(metadata["facts"])


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
