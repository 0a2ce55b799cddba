"""Merging in execution order block by block, for models larger than memory.

At a block the weights of all experts are loaded, and the merged model's begin as their mean. Their passes go through it
in lockstep, its layers are merged one after the other, and what comes of it is written before the passes go on. The
merged model's passes see exactly what is written, so that a run that goes on after an interruption sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from statsmerge_ext.calibration import Batch
from statsmerge_ext.engine.block_sweep import BlockSweep, InMemory
from statsmerge_ext.engine.blocks import Block, BlockModel
from statsmerge_ext.engine.dataflow import Flow, flows_among, tracing
from statsmerge_ext.engine.layer_by_layer import Passes
from statsmerge_ext.engine.lockstep import Pass, Step, in_step, under_way
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.evidence.observe import Observation, observe
from statsmerge_ext.layers import Layer

#: The merged model's name among those of the experts, which are not empty.
_MERGED = ""


class OrderedSweep(BlockSweep, Passes):
    """The sweep for methods in execution order: problems have passes that are at their block.

    Args:
        model, calls, problem, directory, budget: as of :class:`BlockSweep`.
        flows: as rehearsed by :func:`rehearse_flows`.
        written: what has been written of the merged model, under its names.
        rounded: (key, elements of it) -> these as they will be written.
    """

    def __init__(
        self,
        model: BlockModel,
        calls: list[Block],
        problem: MergeProblem,
        directory: Path,
        budget: int,
        *,
        flows: Mapping[str, Flow],
        written: Mapping[str, Tensor],
        rounded: Callable[[str, Tensor], Tensor],
    ) -> None:
        models = {name: model.another() for name in (*problem.experts, _MERGED)}
        BlockSweep.__init__(self, models, calls, problem, directory, budget)
        Passes.__init__(self, self._batches, models[_MERGED].modules, [], flows)
        self._written, self._round = written, rounded
        #: The model of each pass: those of the experts, and then the merged one's.
        self._names = [name for name, _ in self._batches] + [_MERGED] * len(self._batches)
        self._running: list[Pass] = []
        self._block: Block | None = None  # that is merged

    def problems(
        self, *, without: Container[str] = (), instead: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Block, MergeProblem | None]]:
        """As of :class:`BlockSweep`; what is never called comes first, since others may need it. A problem has to be
        merged and written before the next one is asked for."""
        instead = instead or {}
        for block in self._blocks:
            if block in self._calls:
                continue
            if block.path in without:
                yield block, None
                continue
            with self._at(block) as problem:
                yield block, problem
        batches = [batch for _, batch in self._batches] * 2
        self._running = [
            self._models[name].run(batch, partial(self._watching, place), self._end, instead)
            for place, (name, batch) in enumerate(zip(self._names, batches, strict=True))
        ]
        named = [(name, each) for (name, _), each in zip(self._batches * 2, self._running, strict=True)]
        with ExitStack() as stack:
            stack.callback(self.carried.forget)
            stack.enter_context(under_way(self._running))
            self._go_through(self._model.resident)
            for block in self._calls:
                self._check_arrived(block, named)
                if block.path in without or block.path in instead or not block.layers:
                    self._go_through(block, hollow=block.path in instead)
                    yield block, None
                else:
                    with self._at(block) as problem:
                        yield block, problem
            self._check_arrived(None, named)

    def steps(self) -> Iterator[Step]:
        if self._block in self._calls:
            self._take(range(len(self._running)))
            yield from in_step(self._running, self._problem.layers, self._take)

    @contextmanager
    def present(self, place: int) -> Iterator[None]:
        pair = (place, place + len(self._batches))
        with self._clock(self._block, "samples"):
            for each in pair:
                self.carried.resume(each)
            yield
            for each in pair:
                if self._running[each].at:
                    self.carried.suspend(each)

    def rounded(self, key: str, merged: Tensor) -> Tensor:
        return self._round(key, merged)

    @contextmanager
    def _at(self, block: Block) -> Iterator[MergeProblem]:
        """The problem of ``block``, all of whose weights are loaded while the context is open."""
        self._block, self.layers = block, list(block.layers)
        with ExitStack() as stack:
            with self._clock(block, "experts"):
                loaded = {name: stack.enter_context(self._loaded(name, block)) for name in self._models}
            self.parameters = loaded.pop(_MERGED)
            base = _Computed(self._problem.base)
            yield replace(self._problem, layers=self.layers, base=base, experts=loaded, passes=self)
            self.parameters = {}

    def _weights(self, name: str, block: Block) -> Iterator[tuple[str, Tensor]]:
        """As of :class:`BlockSweep`; the merged model's are what is written, or room for what is to be merged."""
        if name != _MERGED:
            yield from super()._weights(name, block)
            return
        to_merge = {layer.parameter for layer in block.layers} if block is self._block else set()
        for key in block.keys:
            if key in to_merge:
                yield key, torch.empty(self._model.shapes[key])
            elif key in self._written:
                yield key, self._written[key]

    def _go_through(self, block: Block, *, hollow: bool = False) -> None:
        """Take all passes through a block that is not merged, model after model, to the next one."""
        self._block = None
        for name in self._models:
            own = [place for place, of_model in enumerate(self._names) if of_model == name]
            if own:
                with self._loaded(name, block, hollow=hollow), self._clock(block, "samples"):
                    for place in own:
                        self._advance(place, self._running[place])
                        while isinstance(self._running[place].at, Observation):
                            self._advance(place, self._running[place])

    def _take(self, places: Sequence[int]) -> None:
        with self._clock(self._block, "samples"):
            for place in places:
                self._advance(place, self._running[place])

    @contextmanager
    def _watching(self, place: int, model: nn.Module, suspend: Callable[[object], None]) -> Iterator[None]:
        with self.carried.following(place), observe(model, self._model.layers, suspend):
            yield


def rehearse_flows(model: BlockModel, batch: Batch, layers: list[Layer]) -> tuple[list[Block], dict[str, Flow]]:
    """The blocks in the order of their calls, and the surroundings of those ``layers`` that are to be merged in
    execution order, found with one sample and no weights.

    Raises:
        CheckpointError: the model cannot be merged in execution order block by block, because a layer is called several
            times, or belongs to no block, or what surrounds it does not.
        Exception: whatever the model raises.
    """
    found: dict[str, Flow] = {}

    @contextmanager
    def watch(modules: nn.Module, suspend: Callable[[object], None]) -> Iterator[None]:
        with tracing(modules, model.layers) as flows:
            yield
        # Matrices of a stack cannot be told from each other without memory of their own; nothing surrounds them.
        flows = {name: flow for name, flow in flows.items() if name not in stacked}
        found.update(flows_among(flows, layers))

    stacked = {layer.name for layer in model.layers if layer.source == "product"}
    calls = model.rehearse(batch, watch)
    block_of = {layer.name: block for block in model.blocks for layer in block.layers}
    owner = {layer.parameter: block for block in (*model.blocks, model.resident) for layer in block.layers}
    for name, flow in found.items():
        around = [name, *([flow.norm.name] if flow.norm else []), *([flow.skip] if flow.skip else [])]
        if len({block_of.get(each) for each in around}) > 1 or name not in block_of:
            raise CheckpointError(f"layer {name!r}: what is added to its output, or follows it, is beyond its block")
        if flow.calls > 1:
            raise CheckpointError(f"layer {name!r} is called several times in a forward pass")
    for place, block in enumerate(calls):
        for key in block.keys:
            if key in owner and owner[key] in calls[place + 1 :] and owner[key] not in calls[: place + 1]:
                raise CheckpointError(f"parameter {key!r} is used in {block.path!r} before it is merged")
    return calls, found


class _Computed(InMemory):
    """A state in the dtype that merging computes in."""

    def _read(self, key: str) -> Tensor:
        tensor = super()._read(key)
        return tensor.float() if tensor.is_floating_point() else tensor
