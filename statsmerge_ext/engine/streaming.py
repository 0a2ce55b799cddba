"""Reading models piece by piece while earlier pieces are computed and written, in bounded memory.

Threads read ahead, others compute, and results come back in order, so that whoever takes them can
write one piece while the next ones are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.compatibility import dtype_of, has_runs, run_of, shape_of
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer

#: Elements that are computed at a time: few enough for intermediate results to stay in the caches.
BLOCK = 65536
#: Bytes of models that are in memory at a time, unless the caller says otherwise.
DEFAULT_BUDGET = 2**29
_LONGEST = 32 * BLOCK  # of a piece: long enough to be worth its threads' taking turns
_READERS = 2  # threads: the disk is busy while what it brought is copied
_IN_FLIGHT = 8  # pieces: read, computed and written, and some waiting in between

Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """Elements ``first`` … ``first + count`` of a layer taken as flat. ``first`` is a multiple of :data:`BLOCK`."""

    layer: Layer
    first: int
    count: int

    def read(self, state: Mapping[str, Tensor], into: Tensor | None = None) -> Tensor:
        """The piece of ``state``, flat, as it is stored; ``into`` as in :meth:`Checkpoint.run`."""
        start = self.start(state)
        return run_of(state, self.layer.parameter, start, start + self.count, into)

    def start(self, state: Mapping[str, Tensor]) -> int:
        """The number of the first element in the layer's parameter taken as flat."""
        rows = self.layer.rows
        return self.first + (0 if rows is None else rows[0] * shape_of(state, self.layer.parameter)[1:].numel())


def layer_shape(state: Mapping[str, Tensor], layer: Layer) -> torch.Size:
    """The shape of a layer; nothing is read for it."""
    shape = shape_of(state, layer.parameter)
    return shape if layer.rows is None else torch.Size((layer.rows[1] - layer.rows[0], *shape[1:]))


class Stream:
    """The layers of base and experts, cut into pieces that are read ahead.

    Args:
        base, experts: the models: checkpoints, state dicts, or views of either.
        layers: the layers, in the order in which they come.
        whole: never cut a layer: what is computed needs all of it.
        alone: names of layers of which only the base is read, if they are whole.
        memory_budget: bytes of the models that may be in memory at a time; None: a default, exceeded where it must.

    Raises:
        MethodError: the memory budget is too small for a single piece.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Iterable[Mapping[str, Tensor]],
        layers: Iterable[Layer],
        *,
        whole: bool,
        alone: Container[str] = (),
        memory_budget: int | None = None,
    ) -> None:
        self._whole, self._alone = whole, alone
        self._states = [base, *experts]
        budget = memory_budget or DEFAULT_BUDGET
        layers = list(layers)
        widest = max((self._width(layer) for layer in layers), default=1)
        length = min(_LONGEST, budget // (_IN_FLIGHT * widest) // BLOCK * BLOCK) or BLOCK
        self._slot = length * widest
        self.pieces: list[Piece] = []
        for layer in layers:
            count = layer_shape(base, layer).numel()
            step = length if self._can_be_cut(layer) else max(count, 1)
            self.pieces += [Piece(layer, at, min(step, count - at)) for at in range(0, max(count, 1), step)]
        sizes = [self._bytes(piece) for piece in self.pieces]
        most = sum(sizes) if whole else _IN_FLIGHT * self._slot
        #: bytes that are taken at most
        self.memory = max(min(budget, most), max(sizes, default=0))
        if memory_budget is not None and self.memory > memory_budget:
            largest = max(self.pieces, key=self._bytes)
            raise MethodError(
                f"memory_budget: {memory_budget} bytes are too few; {self.memory} are needed for "
                f"{largest.count} elements of {largest.layer.name!r} at a time"
            )

    def results(
        self, compute: Callable[[Piece, Tensor, list[Tensor]], Result], pieces: Iterable[Piece] | None = None
    ) -> Iterator[tuple[Piece, Result]]:
        """(piece, ``compute(piece, base, experts)``) for the ``pieces`` (None: all), in order.

        ``compute`` gets flat tensors as they are stored. It is called from several threads at once unless layers are
        whole; then it is called from this one.
        """
        readers = ThreadPoolExecutor(_READERS, "read")
        threads = torch.get_num_threads()
        # Pieces are computed side by side, each by one thread: setting that concerns the pool's own threads only, and
        # what torch remembers of it for later ones is set back below.
        workers = None if self._whole else ThreadPoolExecutor(threads, "compute", torch.set_num_threads, (1,))
        waiting: deque[tuple[Piece, Future]] = deque()
        held = 0
        free: list[Tensor] = []  # memory of pieces that are done with, for others to be read to

        def work(piece: Piece, read: Future) -> Result:
            memory, base, experts = read.result()
            with torch.no_grad():
                result = compute(piece, base, experts)
            if memory is not None:
                free.append(memory)
            return result

        def first_result() -> tuple[Piece, Result]:
            nonlocal held
            piece, future = waiting.popleft()
            result = future.result() if workers else work(piece, future)
            held -= self._bytes(piece)
            return piece, result

        try:
            for piece in self.pieces if pieces is None else pieces:
                while waiting and held + self._bytes(piece) > self.memory:
                    yield first_result()
                read = readers.submit(self._read, piece, free)
                waiting.append((piece, workers.submit(work, piece, read) if workers else read))
                held += self._bytes(piece)
            while waiting:
                yield first_result()
        finally:
            readers.shutdown(cancel_futures=True)
            if workers:
                workers.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)

    def _read(self, piece: Piece, free: list[Tensor]) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Memory to be given back, and the piece of base and experts in it."""
        if not self._can_be_cut(piece.layer):
            base, *experts = (piece.read(state) for state in self._read_of(piece.layer))
            return None, base, experts
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(self._slot, dtype=torch.uint8)
        parts = memory.split(self._slot // len(self._states) // 64 * 64)
        base, *experts = (piece.read(state, part) for state, part in zip(self._states, parts))
        return memory, base, experts

    def _can_be_cut(self, layer: Layer) -> bool:
        return not self._whole and all(has_runs(state, layer.parameter) for state in self._states)

    def _read_of(self, layer: Layer) -> list[Mapping[str, Tensor]]:
        """The models that ``layer`` is read of."""
        return self._states[:1] if self._whole and layer.name in self._alone else self._states

    def _width(self, layer: Layer) -> int:
        """Bytes an element takes: of each model as it is read, all of them as wide as the widest; and of the result."""
        states = self._read_of(layer)
        return (len(states) + 1) * max(dtype_of(state, layer.parameter).itemsize for state in states)

    def _bytes(self, piece: Piece) -> int:
        """Bytes a piece takes; where it is not computed block by block, with its intermediate results."""
        if self._can_be_cut(piece.layer):
            return self._slot
        return piece.count * (self._width(piece.layer) + 4 * (len(self._read_of(piece.layer)) + 2))
