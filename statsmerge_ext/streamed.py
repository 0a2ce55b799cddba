"""A merge that is written while it is computed: models and result pass through memory in pieces.

It may take several runs, and several processes; the output is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.merging import Solved
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.output import ResumableOutput, resumable_output


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
