"""Gram evidence block by block, for models larger than memory.

The experts' forward passes go through the model's own code side by side. Wherever they are about to call a block, the
experts' weights of it are loaded in turn: each expert's passes go on to the next block, and Gram sums of this one are
taken on the way. What is carried from block to block is what the passes themselves hold, so that masks, positions and
residuals are the model's own affair.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from statsmerge_ext.calibration import Batch
from statsmerge_ext.checkpoints import check_finite
from statsmerge_ext.checkpoints.compatibility import has_runs, run_of, shape_of
from statsmerge_ext.engine.blocks import Block, BlockModel
from statsmerge_ext.engine.carried import CarriedStates
from statsmerge_ext.engine.lockstep import Pass
from statsmerge_ext.engine.shared_evidence import added_up
from statsmerge_ext.engine.together import samples
from statsmerge_ext.errors import CalibrationError
from statsmerge_ext.evidence import GramEvidence
from statsmerge_ext.evidence.grams import Collector, add_expert, finish
from statsmerge_ext.evidence.observe import Observation, observe
from statsmerge_ext.layers import Layer


class BlockSweep:
    """One sweep of all experts' calibration samples through a model.

    Args:
        model: the architecture.
        calls: the blocks in the order of their calls, as rehearsed.
        base, experts: under the model's names; lazy.
        sources: how error messages call the base and each expert.
        batches: expert -> unlabelled batches; of several processes, those that this one is to run.
        carried: where hidden states are between two blocks.
        watched: the layers that evidence is collected of.

    Attributes:
        seconds: path of a block -> seconds spent there on experts' weights and sums ("experts"), and on their samples
            ("samples").
    """

    def __init__(
        self,
        model: BlockModel,
        calls: list[Block],
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        sources: Mapping[str, str],
        batches: Mapping[str, list[Batch]],
        carried: CarriedStates,
        watched: list[Layer],
    ) -> None:
        self._model, self._calls, self._carried, self._watched = model, calls, carried, watched
        self._base, self._experts, self._sources = base, experts, sources
        self._batches = [(name, batch) for name in experts for batch in batches[name]]
        self._receive: Callable[[Observation], None] = _ignore
        self.seconds: dict[str, dict[str, float]] = {}
        last = calls[-1]
        #: A block whose own output nobody needs.
        self._end = last if last.is_leaf and calls.count(last) == 1 else None

    def evidence(
        self, *, without: Container[str] = (), instead: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Block, GramEvidence]]:
        """(block, its evidence) for every block, those that are never called at the end. Several processes go through
        them alike, and the evidence is that of all.

        Blocks whose paths are in ``without`` are gone through, but nothing is summed there. Those in ``instead`` give
        what another block of the same kind has given, and are not computed: path -> its path.

        Raises:
            CalibrationError: what :func:`~statsmerge_ext.evidence.collect_grams` raises; or a sample makes the model
                call its blocks in another order than the one of the rehearsal.
            CheckpointError: weights hold NaN or infinity.
            ProcessError: another process has ended.
        """
        instead = instead or {}
        left = Counter(block.path for block in self._calls)
        called = set(left)
        opened: dict[str, _Sums] = {}
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # before any pass does so, and would put it back amid another
        passes = [self._model.run(batch, self._watching, self._end, instead) for _, batch in self._batches]
        try:
            self._go_on(self._model.resident, passes, None)
            for block in self._calls:
                self._check_arrived(block, passes)
                if block.path in without or block.path in instead:
                    self._go_on(block, passes, None, hollow=block.path in instead)
                else:
                    sums = opened.setdefault(block.path, _Sums(list(self._experts), self._model.shapes))
                    self._go_on(block, passes, sums)
                    sums = None  # what is opened holds them, and gives them away
                left[block.path] -= 1
                if not left[block.path]:
                    yield block, self._of_all(opened.pop(block.path)) if block.path in opened else self._nothing()
            self._check_arrived(None, passes)
        finally:
            for each in passes:
                each.give_up()
            self._carried.forget()
            torch.backends.mha.set_fastpath_enabled(fastpath)
        for block in (*self._model.blocks, self._model.resident):
            if block.path not in called:
                yield block, self._nothing()

    def _of_all(self, sums: _Sums) -> GramEvidence:
        return added_up(sums.evidence(), list(self._experts))

    def _nothing(self) -> GramEvidence:
        return GramEvidence(list(self._experts))

    def _go_on(self, block: Block, passes: list[Pass], sums: _Sums | None, *, hollow: bool = False) -> None:
        """Take all passes through ``block`` to the next one; their inputs in it are added to ``sums``."""
        for name in self._experts:
            own = [place for place, (of_expert, _) in enumerate(self._batches) if of_expert == name]
            if own:
                self._take(name, block, {place: passes[place] for place in own}, sums, hollow)

    def _take(self, name: str, block: Block, passes: Mapping[int, Pass], sums: _Sums | None, hollow: bool) -> None:
        """Take the passes of one expert through ``block``. Nothing but its sums is left of it in memory."""
        seconds = self.seconds.setdefault(block.path, {"experts": 0.0, "samples": 0.0})
        began = time.perf_counter()
        collector = None
        if sums is not None:
            collector = sums.collector
            collector.start_expert()
        weights = self._model.zeros(block).items() if hollow else self._weights(name, block)
        with self._model.loaded(chain(self._weights(name, self._model.resident), weights)) as expert:
            loaded = time.perf_counter()
            for place, each in passes.items():
                self._advance(place, each, self._batches[place][1], collector)
            passed = time.perf_counter()
            if collector is not None:
                k = list(self._experts).index(name)
                add_expert(sums.gathered, collector, list(block.layers), _Read(self._base), expert, k)
        seconds["experts"] += loaded - began + time.perf_counter() - passed
        seconds["samples"] += passed - loaded

    def _advance(self, place: int, each: Pass, batch: Batch, collector: Collector | None) -> None:
        if collector is not None:
            collector.start_batch(batch)
            self._receive = collector.receive
        try:
            self._carried.resume(place)
            each.advance()
        finally:
            self._receive = _ignore
        if each.at:
            _, arguments = each.at
            self._carried.suspend(place, arguments, samples(batch))

    def _weights(self, name: str, block: Block) -> Iterator[tuple[str, Tensor]]:
        """What expert ``name`` has of ``block``; files may lack counters."""
        state = _Read(self._experts[name])
        for key in block.keys:
            if key in state:
                yield key, check_finite(key, state[key], self._sources[name])

    def _check_arrived(self, block: Block | None, passes: list[Pass]) -> None:
        for (name, _), each in zip(self._batches, passes, strict=True):
            if (each.at and each.at[0]) != block:
                came, expected = (at.path if at else "the end" for at in (each.at and each.at[0], block))
                raise CalibrationError(
                    f"calibration for {name!r}: the model comes to {came!r} where {expected!r} was expected: its graph "
                    "depends on its data, which statsmerge_ext.merge can deal with, in memory"
                )

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        """The context of every pass: whatever a layer sees goes to the collector of the moment."""
        with observe(model, self._watched, lambda observation: self._receive(observation)):
            yield


class _Sums:
    """Evidence of one block while it is collected."""

    def __init__(self, experts: list[str], shapes: Mapping[str, torch.Size]) -> None:
        self.gathered = GramEvidence(experts)
        self.collector = Collector(self.gathered.leaders, shapes, torch.float32, share_inputs=True)

    def evidence(self) -> GramEvidence:
        """All of it, once."""
        finish(self.gathered, self.collector)
        return self.gathered


class _Read(Mapping[str, Tensor]):
    """A state whose tensors are read to memory of their own whenever they are asked for, rather than mapped."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, key: str) -> Tensor:
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


def _ignore(observation: Observation) -> None:
    pass
