"""Output that takes long: built in OUT.partial over as many runs as it takes, and renamed into place at the end."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from types import TracebackType

from statsmerge_ext.checkpoints.writing import move_into_place, sync_tree
from statsmerge_ext.errors import CheckpointError, ProcessError

_LOCK = "lock"


class PartialOutput:
    """The directory OUT.partial beside the output OUT; entered as a context.

    Where the context ends with an interruption, or because something cannot be written, what is done stays there if
    :meth:`keep` was called; any other error leaves nothing.

    Args:
        out: where the output shall be, a file or a directory.
        resume: leave what an earlier run has left there; otherwise it is removed.
        leader: False for a process that only helps another one that builds the output: it changes nothing itself.

    Attributes:
        path: the directory.
        result: the output as it is built, inside the directory.
        resumed: whether an earlier run has left something there that is gone on with.

    Raises:
        CheckpointError: another process is building the same output, or it cannot be written; of an OSError inside the
            context, too.
    """

    def __init__(self, out: Path, *, resume: bool, leader: bool = True) -> None:
        self.out = out
        self.path = partial_path(out)
        self.result = self.path / out.name
        # Without a result, the run before was stopped after it had renamed it, with only the directory left over.
        self.resumed = resume and self.result.exists()
        self._leader = leader
        self._kept = False

    def __enter__(self) -> PartialOutput:
        if not self._leader:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / _LOCK, "w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock.close()
                raise CheckpointError(f"{self.out}: another process is writing it at this moment") from error
            if not self.resumed:
                for path in self.path.iterdir():
                    if path.name != _LOCK:
                        _remove(path)
        except OSError as error:
            raise self._cannot_be_written(error) from error
        return self

    def keep(self) -> None:
        """From now on an interruption leaves something that is worth going on with."""
        self._kept = True

    def publish(self) -> None:
        """Put the result in its place, whole and synced to disk."""
        if not self._leader:
            return
        sync_tree(self.result)
        move_into_place(self.result, self.out)
        shutil.rmtree(self.path, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cause = error.__cause__ if isinstance(error, CheckpointError) else None
        interrupted = any(isinstance(e, (OSError, KeyboardInterrupt, ProcessError)) for e in (error, cause))
        if self._leader:
            if error is not None and not (interrupted and self._kept):
                shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()
        if isinstance(error, OSError):
            raise self._cannot_be_written(error) from error

    def _cannot_be_written(self, error: OSError) -> CheckpointError:
        hint = f"; what is done is kept in {self.path.name}, and the same command goes on there" if self._kept else ""
        return CheckpointError(f"{self.out}: cannot be written: {error.strerror or error}{hint}")


def partial_path(out: Path) -> Path:
    """Where an output is built."""
    return out.with_name(f"{out.name}.partial")


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
