"""Many forward passes through the same layers, side by side.

Each pass runs in a thread of its own that is suspended whenever something watched is about to be called. Between two
steps all of them wait, and the weights of a layer may be changed in place: what comes after sees the new ones. A model
of any module tree is thus gone through once, in execution order, with no more in memory than what the passes hold at
one layer. Passes share nothing that they write to, so results do not depend on scheduling.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from statsmerge_ext.engine import processes
from statsmerge_ext.evidence.observe import Observation, observe
from statsmerge_ext.layers import Layer


@dataclass(frozen=True)
class Step:
    """The passes have come to the same layers.

    Attributes:
        layers: the layers that are about to be called, of one module.
        arrivals: one entry a pass, in order: its observation of these layers, or None where a pass does not call them
            now, as may be with models whose graph depends on their data.
    """

    layers: tuple[Layer, ...]
    arrivals: list[Observation | None]


def lockstep(
    passes: Sequence[tuple[nn.Module, object]], layers: list[Layer], forward: Callable[[nn.Module, object], object]
) -> Iterator[Step]:
    """Run all ``passes`` together and yield wherever they are about to call some of ``layers``, as :func:`in_step`.

    Args:
        passes: pairs of a model and a batch for it. Where a model takes part in several passes, each gets a copy of its
            modules with the very same parameters and buffers.
        layers: of :func:`~statsmerge_ext.layers.find_layers` for that architecture.
        forward: runs a model on a batch.

    Raises whatever a forward pass raises; all passes are then given up.
    """
    uses = Counter(id(model) for model, _ in passes)

    def watch(model: nn.Module, suspend: Callable[[Observation], None]) -> AbstractContextManager:
        return observe(model, layers, suspend)

    models = (sharing_copy(model) if uses[id(model)] > 1 else model for model, _ in passes)
    with under_way(
        [Pass(model, watch, forward, batch) for model, (_, batch) in zip(models, passes, strict=True)]
    ) as running:
        _advance(running)
        yield from in_step(running, layers, lambda places: _advance([running[place] for place in places]))


def in_step(running: Sequence[Pass], layers: list[Layer], advance: Callable[[list[int]], None]) -> Iterator[Step]:
    """Yield wherever the passes that are ``running`` are about to call some of ``layers``, until none of them is.

    Where they are at different layers, those of them go first that are at the earliest one in the order of ``layers``.
    ``advance(places)`` takes the passes of these numbers on to where they are suspended next. Several processes go
    through the same steps; where one has no pass at a layer, its step has no arrivals.

    Raises ProcessError if another process has ended.
    """
    order = {layer.name: place for place, layer in enumerate(layers)}
    while True:
        at = [
            tuple(order[layer.name] for layer in each.at.layers) if isinstance(each.at, Observation) else None
            for each in running
        ]
        everywhere = processes.of_all(min(filter(None, at), default=None))
        now = min(filter(None, everywhere), default=None)
        if now is None:
            return
        arrived = [place for place, there in enumerate(at) if there == now]
        arrivals = [each.at if there == now else None for each, there in zip(running, at, strict=True)]
        yield Step(tuple(layers[place] for place in now), arrivals)
        advance(arrived)


@contextmanager
def under_way(passes: list[Pass]) -> Iterator[list[Pass]]:
    """``passes`` that have not begun, for as long as the context is open; in the end they are given up."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # before any pass does so, and would put it back amid another
    try:
        yield passes
    finally:
        for each in passes:
            each.give_up()
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _advance(passes: list[Pass]) -> None:
    """Let ``passes`` go on to their next places or ends, as many at a time as torch has threads, each with its
    share of them. Raises what a forward pass raises."""
    threads = torch.get_num_threads()
    together = max(1, min(threads, len(passes)))
    torch.set_num_threads(threads // together)
    try:
        for place, each in enumerate(passes):
            if place >= together:
                passes[place - together].wait()
            each.go_on()
        for each in passes[-together:]:
            each.wait()
    finally:
        torch.set_num_threads(threads)


class GivenUp(BaseException):
    """Unwinds a forward pass of which nothing more is needed; no handler of the model's own is meant to catch it."""


class Pass:
    """One forward pass, suspended wherever it is told to be.

    Args:
        model, batch: what is run by ``forward(model, batch)``, without gradients.
        watch: ``watch(model, suspend)`` is the context of the whole pass; what it installs calls ``suspend(place)``
            from the pass's thread to stop there, or raises :class:`GivenUp` to end the pass.

    Attributes:
        at: the place where it is suspended; None before its beginning and after its end.
    """

    def __init__(
        self,
        model: nn.Module,
        watch: Callable[[nn.Module, Callable[[object], None]], AbstractContextManager],
        forward: Callable[[nn.Module, object], object],
        batch: object,
    ) -> None:
        self.at: object | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, watch, forward, batch), daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Go on to the next place, or to the end. Raises what the forward pass raises."""
        self.go_on()
        self.wait()

    def go_on(self) -> None:
        """Set out for the next place, or the end."""
        self.at = None
        self._go.release()

    def wait(self) -> None:
        """Wait until it is there. Raises what the forward pass raises."""
        self._paused.acquire()
        if self._error:
            raise self._error

    def give_up(self) -> None:
        """End the pass wherever it is."""
        self._abandoned = True
        self.at = None
        self._go.release()
        self._thread.join()

    def _run(self, model: nn.Module, watch: Callable, forward: Callable, batch: object) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad(), watch(model, self._suspend):
                    forward(model, batch)
        except GivenUp:
            pass
        except BaseException as error:  # raised again where the pass was asked to go on
            self._error = error
        self._paused.release()

    def _suspend(self, place: object) -> None:
        self.at = place
        self._paused.release()
        self._go.acquire()
        if self._abandoned:
            raise GivenUp


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model``'s modules, with hooks and state of their own, around the same parameters and buffers."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
