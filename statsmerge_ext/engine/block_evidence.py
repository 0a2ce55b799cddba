"""Gram evidence block by block, for models larger than memory.

At a block each expert's weights are loaded in turn, its passes go on to the next block, and Gram sums of this one are
taken on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from statsmerge_ext.calibration import Batch
from statsmerge_ext.engine.block_sweep import BlockSweep, InMemory
from statsmerge_ext.engine.blocks import Block, BlockModel
from statsmerge_ext.engine.lockstep import Pass, under_way
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.engine.shared_evidence import added_up
from statsmerge_ext.engine.streaming import layer_shape
from statsmerge_ext.evidence import GramEvidence
from statsmerge_ext.evidence.grams import Collector, add_expert, finish
from statsmerge_ext.evidence.observe import Observation, observe
from statsmerge_ext.layers import Layer

# Elements of a table without Gram matrix that are merged at a time, so that a long one is never in memory whole.
_ELEMENTS = 2**22


class GramSweep(BlockSweep):
    """The sweep for methods that look at Gram matrices: problems have the evidence of their layers.

    Experts share one model, into which their weights are loaded in turn.

    Args:
        model, calls, problem, directory, budget: as of :class:`BlockSweep`.
        watched: the layers that evidence is collected of.
    """

    def __init__(
        self,
        model: BlockModel,
        calls: list[Block],
        problem: MergeProblem,
        directory: Path,
        budget: int,
        *,
        watched: list[Layer],
    ) -> None:
        super().__init__(dict.fromkeys(problem.experts, model), calls, problem, directory, budget)
        self._watched = watched
        self._receive: Callable[[Observation], None] = _ignore

    def problems(
        self, *, without: Container[str] = (), instead: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Block, MergeProblem | None]]:
        instead = instead or {}
        left = Counter(block.path for block in self._calls)
        called = set(left)
        opened: dict[str, _Sums] = {}
        passes = [
            self._model.run(batch, partial(self._watching, place), self._end, instead)
            for place, (_, batch) in enumerate(self._batches)
        ]
        named = [(name, each) for (name, _), each in zip(self._batches, passes, strict=True)]
        with ExitStack() as stack:
            stack.callback(self.carried.forget)
            stack.enter_context(under_way(passes))
            self._go_on(self._model.resident, passes, None)
            for block in self._calls:
                self._check_arrived(block, named)
                merged = block.path not in without and block.path not in instead
                if merged:
                    opened.setdefault(block.path, _Sums(list(self._problem.experts), self._model))
                self._go_on(block, passes, opened.get(block.path), hollow=block.path in instead)
                left[block.path] -= 1
                if not left[block.path]:
                    yield block, self._of_all(block, opened.pop(block.path)) if merged else None
            self._check_arrived(None, named)
        for block in self._blocks:
            if block.path not in called:
                yield block, None if block.path in without else self._of_none(block)

    def _of_all(self, block: Block, sums: _Sums) -> MergeProblem:
        return self._of(block, added_up(sums.evidence(), list(self._problem.experts)))

    def _of_none(self, block: Block) -> MergeProblem:
        return self._of(block, GramEvidence(list(self._problem.experts)))

    def _of(self, block: Block, evidence: GramEvidence) -> MergeProblem:
        layers = list(_in_rows(block.layers, evidence, self._problem))
        return replace(self._problem, layers=layers, evidence=evidence)

    def _go_on(self, block: Block, passes: list[Pass], sums: _Sums | None, *, hollow: bool = False) -> None:
        """Take all passes through ``block`` to the next one; their inputs in it are added to ``sums``."""
        for name in self._problem.experts:
            own = [place for place, (of_expert, _) in enumerate(self._batches) if of_expert == name]
            if own:
                self._take(name, block, {place: passes[place] for place in own}, sums, hollow)

    def _take(self, name: str, block: Block, passes: Mapping[int, Pass], sums: _Sums | None, hollow: bool) -> None:
        """Take the passes of one expert through ``block``. Nothing but its sums is left of it in memory."""
        collector = None
        with ExitStack() as stack:
            with self._clock(block, "experts"):
                if sums is not None:
                    collector = sums.collector
                    collector.start_expert()
                expert = stack.enter_context(self._loaded(name, block, hollow=hollow))
            with self._clock(block, "samples"):
                for place, each in passes.items():
                    self._observed(place, each, self._batches[place][1], collector)
            with self._clock(block, "experts"):
                if collector is not None:
                    k = list(self._problem.experts).index(name)
                    add_expert(sums.gathered, collector, list(block.layers), InMemory(self._problem.base), expert, k)

    def _observed(self, place: int, each: Pass, batch: Batch, collector: Collector | None) -> None:
        if collector is not None:
            collector.start_batch(batch)
            self._receive = collector.receive
        try:
            self._advance(place, each)
        finally:
            self._receive = _ignore

    @contextmanager
    def _watching(self, place: int, model: nn.Module, suspend: Callable[[object], None]) -> Iterator[None]:
        """The context of a pass: whatever a layer sees goes to the collector of the moment."""

        def receive(observation: Observation) -> None:
            with following.paused():
                self._receive(observation)

        with self.carried.following(place) as following, observe(model, self._watched, receive):
            yield


class _Sums:
    """Evidence of one block while it is collected."""

    def __init__(self, experts: list[str], model: BlockModel) -> None:
        self.gathered = GramEvidence(experts)
        self.collector = Collector(self.gathered.leaders, model.shapes, torch.float32, share_inputs=True)

    def evidence(self) -> GramEvidence:
        """All of it, once."""
        finish(self.gathered, self.collector)
        return self.gathered


def _in_rows(layers: Sequence[Layer], evidence: GramEvidence, problem: MergeProblem) -> Iterator[Layer]:
    """``layers``, tables without Gram matrix cut into parts of a few rows; their ``evidence`` is cut with them."""
    for layer in layers:
        if layer.kind in ("linear", "conv"):
            yield layer
            continue
        weights, first = evidence.weights.get(layer.name), (layer.rows or (0,))[0]
        for part in layer.in_rows(layer_shape(problem.base, layer), _ELEMENTS):
            if part is not layer and weights is not None:
                evidence.weights[part.name] = weights[:, part.rows[0] - first : part.rows[1] - first]
            yield part


def _ignore(observation: Observation) -> None:
    pass
