"""A merge that is written while it is computed: models and result pass through memory in pieces.

It may take several runs, and several processes; the output is the same.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Mapping
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.checkpoints import Checkpoint
from statsmerge_ext.checkpoints.compatibility import Renamed, dtype_of, floating_names, shape_of
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.merging import Solved, solve
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.methods import Method
from statsmerge_ext.output import ResumableOutput, resumable_output

# What an estimate merges: enough to see the disk at work, and at least this share of all.
_SAMPLE_BYTES, _SAMPLE_SHARE = 2**29, 0.1


def write_streamed(
    solved: Solved,
    out: Path,
    infos: Mapping[str, TensorInfo],
    identity: Mapping[str, object],
    *,
    progress: bool = False,
    **writing: object,
) -> None:
    """Compute the merged parameters and write them, with all that belongs to them, whole or not at all.

    Every process of a group calls this alike and takes its share of the pieces.

    Args:
        solved: the merge; its solution's parameters are still to be computed.
        out, infos, identity, writing: of :func:`resumable_output`.
        progress: show a progress bar.

    Raises:
        CheckpointError: a model holds NaN or infinity, or the output's dtype cannot hold a merged value; and with
        ProcessError: as :func:`resumable_output`.
    """
    with resumable_output(out, infos, identity, **writing) as files:
        if processes.rank() == 0:
            for name, tensor in merge_buffers(solved.problem, solved.solution.parameters, reestimate=False).items():
                files.write(name, files.converted(name, tensor))
        _write_pieces(solved, files, progress)


def estimate(
    method: Method,
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
    options = {**options, "progress": False, "sample": True}
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


def _write_pieces(solved: Solved, files: ResumableOutput, progress: bool) -> None:
    """Compute and write this process's share of the pieces that no process has done in an earlier run."""
    parameters = solved.solution.parameters
    stream = parameters.stream(name for name in files.names if name in parameters)
    done = torch.zeros(len(stream.pieces), dtype=torch.bool)
    for earlier in files.saved:
        done |= earlier["done"]
    left = (~done).nonzero().flatten().tolist()
    mine = processes.share(left, [stream.pieces[place].count for place in left])

    def compute(piece: Piece, base: Tensor, experts: list[Tensor]) -> Tensor:
        return files.converted(piece.layer.parameter, parameters.merged(piece, base, experts))

    with closing(stream.results(compute, [stream.pieces[place] for place in mine])) as results:
        for place, (piece, merged) in zip(mine, tqdm(results, "Merging", len(mine), disable=not progress)):
            files.write(piece.layer.parameter, merged, piece.start(solved.problem.base))
            done[place] = True
            files.save_if_due({"done": done})
