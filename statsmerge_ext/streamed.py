"""A merge that is written while it is computed: models and result pass through memory in pieces.

It may take several runs, and several processes; the output is the same.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.checkpoints import Checkpoint
from statsmerge_ext.checkpoints.compatibility import Renamed, check_finite, dtype_of, floating_names, shape_of
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.partial import PartialOutput
from statsmerge_ext.checkpoints.weight_files import ShardedWeights, WeightFile
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.journal import Journal
from statsmerge_ext.engine.merging import Solved, solve
from statsmerge_ext.engine.streaming import Piece

# How much work an interruption may cost. Saving waits for the disk, but nothing waits for saving.
_SECONDS_BETWEEN_SAVES = 2.0
# What an estimate merges: enough to see the disk at work, and at least this share of all.
_SAMPLE_BYTES, _SAMPLE_SHARE = 2**29, 0.1


def write_streamed(
    solved: Solved,
    out: Path,
    infos: Mapping[str, TensorInfo],
    identity: Mapping[str, object],
    *,
    resume: bool,
    shard_bytes: int | None,
    metadata: Mapping[str, str] | None = None,
    companions: Callable[[Path], None] | None = None,
    progress: bool = False,
) -> None:
    """Compute the merged parameters and write them, with all that belongs to them, whole or not at all.

    Every process of a group calls this alike and takes its share of the pieces. The journal of each, in OUT.partial,
    says which of them are on the disk.

    Args:
        solved: the merge; its solution's parameters are still to be computed.
        out: the directory, or safetensors file, to make.
        infos: name → shape and dtype of every tensor of the output.
        identity: JSON-able facts that decide the result.
        resume: go on with what an interrupted run of the same merge has left.
        shard_bytes: largest weight file of a directory; None: ``out`` is a file.
        metadata: texts for the header of that file.
        companions: writes what a directory holds beside the weights.
        progress: show a progress bar.

    Raises:
        CheckpointError: a model holds NaN or infinity, or the output's dtype cannot hold a merged value; what was left
            is of another merge, or is being gone on with by another process; ``out`` cannot be written.
        ProcessError: another process of the group has ended.
    """
    leader = processes.rank() == 0
    partial = PartialOutput(out, resume=resume, leader=leader)
    journals = partial.path.glob("journal.*") if partial.resumed else ()
    saved = [_journal(partial, path.name, identity).load()["done"] for path in sorted(journals)]
    processes.wait_for_all()
    with partial:
        if saved:
            partial.keep()
        if leader:
            # All that is known beforehand is written first: after the weights only the renaming is left to fail.
            if shard_bytes is not None:
                partial.result.mkdir(exist_ok=True)
                companions(partial.result)
            _open_files(partial, infos, shard_bytes, metadata, reopen=bool(saved)).close()
        processes.wait_for_all()
        with closing(_open_files(partial, infos, shard_bytes, metadata, reopen=True)) as files:
            if leader:
                for name, tensor in merge_buffers(solved.problem, solved.solution.parameters, reestimate=False).items():
                    files.write(name, _converted(name, tensor, infos))
            _write_pieces(solved, files, infos, partial, identity, saved, progress)
            files.sync()
        processes.wait_for_all()
        partial.publish()


def estimate(
    method: str,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    infos: Mapping[str, TensorInfo],
    out: Path,
    **options: object,
) -> dict[str, float]:
    """What a merge will need, from merging samples of its tensors into files beside ``out`` that are then removed.

    Args:
        method, base, experts: as for :func:`solve`, with the further ``options``.
        infos: name → shape and dtype of every tensor of the output.
        out: where the output shall be.

    Returns: "bytes_read" (of base and experts), "seconds", and "memory": the largest resident size, in bytes.

    Raises as :func:`solve` and :func:`write_streamed`.
    """
    options = {**options, "progress": False}
    sizes = {name: infos[name].nbytes for name in floating_names(base)}
    names = list(sizes)
    random.Random(0).shuffle(names)
    parent = next(parent for parent in out.absolute().parents if parent.exists())

    def seconds_for(sample: dict[str, str]) -> float:
        began = time.perf_counter()
        of_sample = {name: Renamed(expert, sample) for name, expert in experts.items()}
        solved = solve(method, base=Renamed(base, sample), experts=of_sample, **options)
        with TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as directory:
            file = Path(directory) / "sample.safetensors"
            write_streamed(solved, file, {name: infos[name] for name in sample}, {}, resume=False, shard_bytes=None)
        return time.perf_counter() - began

    # Two samples, a small one and a large one, tell what every byte costs from what every merge costs.
    enough = max(_SAMPLE_BYTES, _SAMPLE_SHARE * sum(sizes.values()))
    reached = list(accumulate((sizes[name] for name in names), initial=0))
    small = {name: name for name, before in zip(names, reached) if before < enough / 5}
    large = {name: name for name, before in zip(names, reached) if before < enough and name not in small}
    total, of_small = sum(sizes.values()), sum(sizes[name] for name in small)
    of_large = sum(sizes[name] for name in large)
    seconds = seconds_for(small) * total / max(1, of_small)
    # The first sample fills all buffers; a second one in the same process would only add what the first has freed.
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if of_large > of_small:
        first, second = seconds * of_small / total, seconds_for(large)
        rate = max(second - first, 0) / (of_large - of_small) or second / of_large
        seconds = second + rate * (total - of_large)
    states = [base, *experts.values()]
    return {
        "bytes_read": sum(shape_of(state, n).numel() * dtype_of(state, n).itemsize for state in states for n in names),
        "seconds": seconds,
        "memory": peak,
    }


def _write_pieces(
    solved: Solved,
    files: WeightFile | ShardedWeights,
    infos: Mapping[str, TensorInfo],
    partial: PartialOutput,
    identity: Mapping[str, object],
    saved: list[Tensor],
    progress: bool,
) -> None:
    """Compute and write this process's share of the pieces that none of the ``saved`` [pieces] says are done."""
    parameters = solved.solution.parameters
    stream = parameters.stream(name for name in files.names if name in parameters)
    done = torch.zeros(len(stream.pieces), dtype=torch.bool)
    for earlier in saved:
        done |= earlier
    left = (~done).nonzero().flatten().tolist()
    mine = processes.share(left, [stream.pieces[place].count for place in left])

    def compute(piece: Piece, base: Tensor, experts: list[Tensor]) -> Tensor:
        return _converted(piece.layer.parameter, parameters.merged(piece, base, experts), infos)

    results = stream.results(compute, [stream.pieces[place] for place in mine])
    journal = _journal(partial, f"journal.{processes.rank()}", identity)
    with _Saver(journal, files.sync, partial.keep) as saver, closing(results):
        for place, (piece, merged) in zip(mine, tqdm(results, "Merging", len(mine), disable=not progress)):
            files.write(piece.layer.parameter, merged, piece.start(solved.problem.base))
            done[place] = True
            saver.save_if_due({"done": done})


def _open_files(
    partial: PartialOutput,
    infos: Mapping[str, TensorInfo],
    shard_bytes: int | None,
    metadata: Mapping[str, str] | None,
    *,
    reopen: bool,
) -> WeightFile | ShardedWeights:
    if shard_bytes is None:
        return WeightFile(partial.result, infos, metadata, reopen=reopen)
    return ShardedWeights(partial.result, infos, shard_bytes, reopen=reopen)


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

    def save_if_due(self, state: dict[str, Tensor]) -> None:
        """Save a copy of ``state``, all of which has been written, unless that is too soon."""
        if self._running and not self._running.done():
            return
        if self._running:
            self._running.result()
        if self._journal.due:
            self._running = self._thread.submit(self._save, {name: value.clone() for name, value in state.items()})

    def _save(self, state: dict[str, Tensor]) -> None:
        self._sync()
        self._journal.save(state)
        self._saved()


def _journal(partial: PartialOutput, name: str, identity: Mapping[str, object]) -> Journal:
    return Journal(partial.path / name, identity, _SECONDS_BETWEEN_SAVES)


def _converted(name: str, tensor: Tensor, infos: Mapping[str, TensorInfo]) -> Tensor:
    return check_finite(name, tensor.to(infos[name].dtype), "the merged model")
