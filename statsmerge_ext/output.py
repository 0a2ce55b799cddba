"""The output of a merge that is written while it is computed, over several runs and by several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from torch import Tensor

from statsmerge_ext.checkpoints.compatibility import check_finite
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.partial import PartialOutput
from statsmerge_ext.checkpoints.weight_files import ShardedWeights, WeightFile
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.journal import Journal

# How much work an interruption may cost. Saving waits for the disk, but nothing waits for saving.
_SECONDS_BETWEEN_SAVES = 2.0


class ResumableOutput:
    """Weight files that are being filled in; made by :func:`resumable_output`.

    Attributes:
        saved: what the processes of an earlier run have noted last, a state each.
        scratch: a directory for what is needed only until the output is there.
        names: the tensors in the order of their bytes.
        path: of the file or directory as it is built.
    """

    def __init__(
        self,
        files: WeightFile | ShardedWeights,
        infos: Mapping[str, TensorInfo],
        path: Path,
        saved: list[dict],
        saver: _Saver,
    ) -> None:
        self.saved, self.scratch, self.path, self.names = saved, path.parent, path, files.names
        self._files, self._infos, self._saver = files, infos, saver

    def converted(self, name: str, tensor: Tensor) -> Tensor:
        """Elements of tensor ``name`` in the output's dtype. Raises CheckpointError if that cannot hold them."""
        return check_finite(name, tensor.to(self._infos[name].dtype), "the merged model")

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Put elements into tensor ``name``, from element ``first`` on. They are in the output's dtype."""
        self._files.write(name, tensor, first)

    def save_if_due(self, state: dict) -> None:
        """Note in the journal that all is on the disk that ``state`` (tensors and plain values) says of it."""
        self._saver.save_if_due(state)


@contextmanager
def resumable_output(
    out: Path,
    infos: Mapping[str, TensorInfo],
    identity: Mapping[str, object],
    *,
    resume: bool,
    shard_bytes: int | None,
    stays_cached: bool = True,
    metadata: Mapping[str, str] | None = None,
    companions: Callable[[Path], None] | None = None,
) -> Iterator[ResumableOutput]:
    """Files to write in the context; where it ends well they are put in their place, whole.

    Every process of a group enters this alike. The journal of each, in OUT.partial, says what is on the disk.

    Args:
        out: the directory, or safetensors file, to make.
        infos: name → shape and dtype of every tensor of the output.
        identity: JSON-able facts that decide the result.
        resume: go on with what an interrupted run of the same merge has left.
        shard_bytes: largest weight file of a directory; None: ``out`` is a file.
        stays_cached: what is written may stay in the page cache.
        metadata: texts for the header of that file.
        companions: writes what a directory holds beside the weights.

    Raises:
        CheckpointError: what was left is of another merge, or is being gone on with by another process; ``out`` cannot
            be written.
        ProcessError: another process of the group has ended.
    """
    leader = processes.rank() == 0
    partial = PartialOutput(out, resume=resume, leader=leader)
    journals = partial.path.glob("journal.*") if partial.resumed else ()
    saved = [_journal(partial, path.name, identity).load() for path in sorted(journals)]
    processes.wait_for_all()

    def files(*, reopen: bool) -> WeightFile | ShardedWeights:
        if shard_bytes is None:
            return WeightFile(partial.result, infos, metadata, reopen=reopen, stays_cached=stays_cached)
        return ShardedWeights(partial.result, infos, shard_bytes, reopen=reopen, stays_cached=stays_cached)

    with partial:
        if saved:
            partial.keep()
        if leader:
            # All that is known beforehand is written first: after the weights only the renaming is left to fail.
            if shard_bytes is not None:
                partial.result.mkdir(exist_ok=True)
                companions(partial.result)
            files(reopen=bool(saved)).close()
        processes.wait_for_all()
        with closing(files(reopen=True)) as opened:
            journal = _journal(partial, f"journal.{processes.rank()}", identity)
            with _Saver(journal, opened.sync, partial.keep) as saver:
                yield ResumableOutput(opened, infos, partial.result, saved, saver)
            opened.sync()
        processes.wait_for_all()
        partial.publish()


class _Saver:
    """Saves to a journal what is certainly on the disk, from a thread of its own."""

    def __init__(self, journal: Journal, sync: Callable[[], None], saved: Callable[[], None]) -> None:
        self._journal, self._sync, self._saved = journal, sync, saved
        self._thread = ThreadPoolExecutor(1, "journal")
        self._running: Future | None = None

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if error[0] is None and self._running:
            self._running.result()

    def save_if_due(self, state: dict) -> None:
        """Save a copy of ``state``, all of which has been written, unless that is too soon."""
        if self._running and not self._running.done():
            return
        if self._running:
            self._running.result()
        if self._journal.due:
            self._running = self._thread.submit(self._save, copy.deepcopy(state))

    def _save(self, state: dict) -> None:
        self._sync()
        self._journal.save(state)
        self._saved()


def _journal(partial: PartialOutput, name: str, identity: Mapping[str, object]) -> Journal:
    return Journal(partial.path / name, identity, _SECONDS_BETWEEN_SAVES)
