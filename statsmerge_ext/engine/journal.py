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
    """

    def __init__(self, path: str | Path, identity: Mapping[str, object]) -> None:
        self.path = Path(path)
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
                "remove it to start anew"
            )
        return state

    def save(self, state: dict) -> None:
        """Keep ``state`` (tensors and plain values), atomically, unless the last time was less than 30 seconds ago.

        Raises CheckpointError when it cannot be written.
        """
        if time.monotonic() - self._saved < _SECONDS_BETWEEN_SAVES:
            return
        with atomic_output(self.path, overwrite=True) as temporary:
            torch.save({"identity": self._identity, "state": state}, temporary)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The computation is finished: nothing is left to take up."""
        self.path.unlink(missing_ok=True)
