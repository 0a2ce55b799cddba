"""Evidence on disk: one safetensors file whose header says what it is and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from statsmerge_ext.checkpoints import Checkpoint, open_checkpoint, save_state_dict
from statsmerge_ext.errors import CalibrationError


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
