"""Progress of a long computation on disk, so that it goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.errors import CheckpointError

_SECONDS_BETWEEN_SAVES = 30.0


class Journal:
    """One file with the state of a computation; only the very same computation can take it up again.

    Args:
        path: the file; it need not exist.
        identity: JSON-able facts that decide the result: method, hyperparameters, fingerprints of models and data.
        seconds: how much work may be lost at most; None: half a minute.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, object], seconds: float | None = None) -> None:
        self.path = Path(path)
        self._seconds = _SECONDS_BETWEEN_SAVES if seconds is None else seconds
        self._identity = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._saved = time.monotonic()

    def load(self) -> dict | None:
        """What was saved last, or None where there is no file.

        Raises CheckpointError for a file that is damaged or of another computation.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True)
            identity, state = content["identity"], content["state"]
        except Exception as error:  # torch, pickle and zipfile each have their own for damaged or foreign content
            raise CheckpointError(f"{self.path}: cannot be read as a journal: {error}") from error
        if identity != self._identity:
            raise CheckpointError(
                f"{self.path}: is the journal of another run (models, data, seed or hyperparameters differ); "
                "start anew without resuming, or remove it"
            )
        return state

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved >= self._seconds

    def save(self, state: dict) -> None:
        """Keep ``state`` (tensors and plain values), atomically, if that is :attr:`due`.

        Raises CheckpointError when it cannot be written.
        """
        if not self.due:
            return
        with atomic_output(self.path, overwrite=True) as temporary:
            torch.save({"identity": self._identity, "state": state}, temporary)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The computation is finished: nothing is left to take up."""
        self.path.unlink(missing_ok=True)
