"""Calibration samples on their way through a model larger than memory, block by block.

Forward passes go through the model's own code side by side. Wherever they are about to call a block, weights of it are
loaded, model after model, and that model's passes go on to the next block. What is carried from block to block is what
the passes themselves hold, so that masks, positions and residuals are the model's own affair.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path

from torch import Tensor

from statsmerge_ext.checkpoints import check_finite
from statsmerge_ext.checkpoints.compatibility import has_runs, run_of, shape_of
from statsmerge_ext.engine.blocks import Block, BlockModel
from statsmerge_ext.engine.carried import CarriedStates
from statsmerge_ext.engine.lockstep import Pass
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import CalibrationError


class BlockSweep:
    """One sweep of all experts' calibration samples through a model.

    Args:
        models: name of an expert -> the architecture, for its weights; experts may have it in common.
        calls: the blocks in the order of their calls, as rehearsed.
        problem: the whole model's, with lazy states under the model's names; its batches are, of several processes,
            those that this one is to run.
        directory, budget: of :class:`CarriedStates`.

    Attributes:
        changed: of :class:`~statsmerge_ext.engine.layer_by_layer.Passes`.
        carried: where hidden states are between two blocks.
        seconds: path of a block -> seconds spent there on experts' weights and sums ("experts"), on their samples
            ("samples"), and on the rest of solving and writing it ("solving").
    """

    changed = False

    def __init__(
        self,
        models: Mapping[str, BlockModel],
        calls: list[Block],
        problem: MergeProblem,
        directory: Path,
        budget: int,
    ) -> None:
        self._models, self._calls, self._problem = models, calls, problem
        self._model = next(iter(models.values()))
        self._batches = [(name, batch) for name in problem.experts for batch in problem.batches[name]]
        buffers = [buffer for model in models.values() for buffer in model.buffers]
        entries = (batch.values() if isinstance(batch, Mapping) else (batch,) for _, batch in self._batches)
        self.carried = CarriedStates(directory, budget, [*buffers, *chain.from_iterable(entries)])
        self.seconds = defaultdict[str, dict[str, float]](lambda: {"experts": 0.0, "samples": 0.0, "solving": 0.0})
        self._clocked = 0.0  # all of these
        last = calls[-1]
        #: A block whose own output nobody needs.
        self._end = last if last.is_leaf and calls.count(last) == 1 else None

    def problems(
        self, *, without: Container[str] = (), instead: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Block, MergeProblem | None]]:
        """(block, its layers as a problem) for every block, or None for one that is not to be merged. Several
        processes go through them alike, and the evidence is that of all.

        Blocks whose paths are in ``without`` are gone through, but not merged. Those in ``instead`` give what another
        block of the same kind has given, and are not computed: path -> its path.

        Raises:
            CalibrationError: what :func:`~statsmerge_ext.evidence.collect_grams` raises; or a sample makes the model
                call its blocks in another order than the one of the rehearsal.
            CheckpointError: weights hold NaN or infinity.
            ProcessError: another process has ended.
        """
        raise NotImplementedError

    def solving(self, block: Block) -> AbstractContextManager[None]:
        """The context in which the problem of ``block`` is solved and written; the time that takes is noted."""
        return self._clock(block, "solving")

    @property
    def _blocks(self) -> tuple[Block, ...]:
        return (*self._model.blocks, self._model.resident)

    @contextmanager
    def _loaded(self, name: str, block: Block, *, hollow: bool = False) -> Iterator[Mapping[str, Tensor]]:
        """While the context is open, the model of that name has its weights of ``block``, or ``hollow`` ones."""
        model = self._models[name]
        weights = model.zeros(block).items() if hollow else self._weights(name, block)
        with (
            model.loaded(chain(self._weights(name, model.resident), weights)) as given,
            self.carried.sharing(given.values()),
        ):
            yield given

    def _weights(self, name: str, block: Block) -> Iterator[tuple[str, Tensor]]:
        """What expert ``name`` has of ``block``; files may lack counters."""
        state = InMemory(self._problem.experts[name])
        for key in block.keys:
            if key in state:
                yield key, check_finite(key, state[key], self._problem.sources[name])

    def _advance(self, place: int, each: Pass) -> None:
        self.carried.resume(place)
        each.advance()
        if each.at:
            self.carried.suspend(place)

    @contextmanager
    def _clock(self, block: Block, what: str) -> Iterator[None]:
        """Add to :attr:`seconds` how long the context is open, without what other clocks within it add."""
        began, before = time.perf_counter(), self._clocked
        try:
            yield
        finally:
            spent = time.perf_counter() - began - (self._clocked - before)
            self.seconds[block.path][what] += spent
            self._clocked += spent

    def _check_arrived(self, block: Block | None, passes: Iterable[tuple[str, Pass]]) -> None:
        """Raise CalibrationError unless all ``passes``, with their experts' names, are at ``block``, or the end."""
        for name, each in passes:
            if (each.at and each.at[0]) != block:
                came, expected = (at.path if at else "the end" for at in (each.at and each.at[0], block))
                raise CalibrationError(
                    f"calibration for {name!r}: the model comes to {came!r} where {expected!r} was expected: its graph "
                    "depends on its data, which statsmerge_ext.merge can deal with, in memory"
                )


class InMemory(Mapping[str, Tensor]):
    """A state whose tensors are read to memory of their own, rather than mapped; the last one is kept. Several threads
    may read it."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        last = self._last
        if last is None or last[0] != key:
            last = self._last = None  # its memory is free before more is taken
            last = self._last = (key, self._read(key))
        return last[1]

    def _read(self, key: str) -> Tensor:
        if not has_runs(self._state, key):
            return self._state[key]
        shape = shape_of(self._state, key)
        return run_of(self._state, key, 0, shape.numel()).view(shape)

    def __contains__(self, key: object) -> bool:
        return key in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
