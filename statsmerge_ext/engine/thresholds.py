"""Which magnitude a given share of a task vector's entries reaches: exactly, without ever holding the task vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.compatibility import dtype_of
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.engine.streaming import BLOCK, Piece, Stream
from statsmerge_ext.layers import Layer

_BINS = 2**17
_SAMPLES = 2**20
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def magnitude_thresholds(problem: MergeProblem, layers: list[Layer], densities: Sequence[float]) -> list[float]:
    """For each expert, the smallest of the share ``density`` of largest |τ| over all entries of the ``layers``.

    Magnitudes are compared as the integers that their bits are, which have the same order. A sample tells where the
    threshold must nearly be; one sweep through the models then counts what lies above and what lies where near it. If
    the sample was misleading, further sweeps narrow the range down.

    Of no entries it is 0. Raises CheckpointError where an input holds NaN or infinity.
    """
    states = [problem.base, *problem.experts.values()]
    wide = any(dtype_of(state, x.parameter) == torch.float64 for state in states for x in layers)
    stream = problem.stream(layers, whole=False)
    count = sum(piece.count for piece in stream.pieces)
    if not count:
        return [0.0] * len(densities)
    infinity = torch.tensor(math.inf, dtype=torch.float64 if wide else torch.float32)
    highest = int(infinity.view(_INTEGERS[infinity.dtype]))  # the integer above those of all finite magnitudes
    searches = [_Search(max(1, round(density * count)), highest) for density in densities]
    for search, sample, density in zip(searches, _samples(problem, stream, wide), densities, strict=True):
        search.start(sample, density)

    mine = processes.share(stream.pieces, [piece.count for piece in stream.pieces])

    def tally(piece: Piece, base: Tensor, experts: list[Tensor]) -> list[tuple[Tensor, int]]:
        near: list[list[Tensor]] = [[] for _ in searches]
        above = [0 for _ in searches]
        for start in range(0, max(piece.count, 1), BLOCK):
            cut = slice(start, start + BLOCK)
            blocks = _bits(problem, piece, base[cut], [expert[cut] for expert in experts], wide)
            for place, (search, bits) in enumerate(zip(searches, blocks, strict=True)):
                is_above = bits >= search.end
                above[place] += int(is_above.count_nonzero())
                near[place].append(bits[(bits >= search.begin) ^ is_above])
        return [(search.bins(torch.cat(of_expert)), n) for search, of_expert, n in zip(searches, near, above)]

    while any(search.threshold is None for search in searches):
        totals = [torch.zeros(_BINS + 1, dtype=torch.int64) for _ in searches]
        for _, tallied in stream.results(tally, mine):
            for total, (bins, above) in zip(totals, tallied, strict=True):
                total.index_add_(0, bins, torch.ones_like(bins))  # few of them: a histogram of all bins takes longer
                total[_BINS] += above
        for search, total in zip(searches, totals, strict=True):
            search.narrow(processes.add_up_(total).tolist())
    dtype = infinity.dtype
    return [float(torch.tensor(search.threshold, dtype=_INTEGERS[dtype]).view(dtype)) for search in searches]


def _samples(problem: MergeProblem, stream: Stream, wide: bool) -> list[Tensor]:
    """About 2^20 of each expert's magnitudes as integers, sorted, from the beginnings of all pieces."""
    pieces = [Piece(piece.layer, piece.first, min(piece.count, BLOCK)) for piece in stream.pieces]
    step = max(1, sum(piece.count for piece in pieces) // _SAMPLES)

    def take(piece: Piece, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
        return [bits[::step].clone() for bits in _bits(problem, piece, base, experts, wide)]

    columns = zip(*(taken for _, taken in stream.results(take, pieces)), strict=True)
    return [torch.cat(column).sort().values for column in columns]


def _bits(problem: MergeProblem, piece: Piece, base: Tensor, experts: list[Tensor], wide: bool) -> list[Tensor]:
    _, task_vectors = problem.differences(piece.layer, base, experts)
    if wide:
        task_vectors = [task_vector.double() for task_vector in task_vectors]
    return [task_vector.abs().view(_INTEGERS[task_vector.dtype]) for task_vector in task_vectors]


@dataclass
class _Search:
    """The search for the bits of the ``rank``-th largest magnitude, known to be within [low, high).

    A sweep counts the magnitudes within [begin, end), in bins of 2^shift, and all above.
    """

    rank: int
    high: int
    low: int = 0
    begin: int = 0
    end: int = 0
    shift: int = 0

    @property
    def threshold(self) -> int | None:
        return self.low if self.high - self.low == 1 else None

    def start(self, sample: Tensor, density: float) -> None:
        """Look first where a sorted sample says."""
        place = (1 - density) * len(sample)
        margin = 4 * math.sqrt(len(sample) * density * (1 - density)) + 2
        first, last = (min(max(int(at), 0), len(sample) - 1) for at in (place - margin, place + margin))
        self._look(int(sample[first]), int(sample[last]) + 1)

    def bins(self, near: Tensor) -> Tensor:
        """The numbers of the bins that magnitudes in [begin, end) are in."""
        return ((near - self.begin) >> self.shift).long()

    def narrow(self, counts: list[int]) -> None:
        """Look next where a sweep puts the threshold: its ``counts`` of the magnitudes in each bin, and above all."""
        seen = counts[_BINS]
        if self.threshold is not None:
            return
        if self.rank <= seen:
            self.low = self.end
            return self._look(self.low, self.high)
        for place in range(_BINS - 1, -1, -1):
            seen += counts[place]
            if self.rank <= seen:
                begin = self.begin + (place << self.shift)
                self.low, self.high = begin, min(begin + (1 << self.shift), self.end)
                return self._look(self.low, self.high)
        self.high = self.begin
        return self._look(self.low, self.high)

    def _look(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.shift = max(0, (end - begin - 1).bit_length() - (_BINS.bit_length() - 1))
