"""A model in blocks: modules that are called one after the other, so that the weights of one are enough at a time.

Nothing is known of any architecture. The blocks of a transformer are the elements of its module lists, whatever the
lists are called; what lies beside a list (embeddings, the last norm, the head) are blocks, too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from statsmerge_ext.calibration import Batch
from statsmerge_ext.engine.lockstep import GivenUp, Pass, sharing_copy
from statsmerge_ext.engine.together import one_sample
from statsmerge_ext.layers import Layer, find_layers

#: ``watch(module tree, suspend)``: a context of a pass.
Watch = Callable[[nn.Module, Callable[[object], None]], AbstractContextManager]

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Block:
    """A module whose weights are in memory only while it is called.

    Attributes:
        path: of the module.
        keys: the entries of the model's state dict that it needs, of tied ones the first.
        layers: those of parameters that no block before it needs: what is merged with it.
        is_leaf: whether the module contains no others.
    """

    path: str
    keys: tuple[str, ...]
    layers: tuple[Layer, ...]
    is_leaf: bool = False


class BlockModel:
    """A model whose weights come and go block by block.

    Args:
        model: a skeleton with parameters on the meta device, which are replaced by empty ones.
        device: where it runs.
        forward: runs it on a batch.

    Attributes:
        layers: all layers of the model.
        shapes: key of the state dict -> shape.
        blocks: in the order of the module tree.
        resident: what belongs to no block: parameters of modules that contain blocks. Its weights are to be there
            whenever a pass goes on.
    """

    def __init__(
        self, model: nn.Module, device: str | torch.device, forward: Callable[[nn.Module, object], object]
    ) -> None:
        self.layers = find_layers(model)
        self.shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        *self.blocks, self.resident = _find_blocks(model, self.layers)
        self._model, self._forward = _with_empty_parameters(model).to(device), forward
        self._slots = self._entries()

    def another(self) -> BlockModel:
        """The same model for other weights."""
        other = copy.copy(self)
        other._model = copy.deepcopy(self._model)
        other._slots = other._entries()
        return other

    @property
    def modules(self) -> nn.Module:
        """The module tree; parameters are there while they are loaded."""
        return self._model

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers, also those that are not in the state dict."""
        return list(self._model.buffers())

    def _entries(self) -> dict[str, Tensor]:
        buffers = {key: buffer for key, buffer in self._model.named_buffers() if key in self.shapes}
        return {**dict(self._model.named_parameters()), **buffers}

    @contextmanager
    def loaded(self, entries: Iterable[tuple[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        """While the context is open, the model has these entries of its state dict; gives them as they are there."""
        given: dict[str, Tensor] = {}
        try:
            for key, tensor in entries:
                given[key] = self._slots[key]
                if isinstance(given[key], nn.Parameter):
                    given[key].data = tensor.to(given[key].device, given[key].dtype)
                else:
                    given[key].copy_(tensor)
            yield given
        finally:
            for slot in given.values():
                if isinstance(slot, nn.Parameter):
                    slot.data = slot.new_empty(0)

    def run(
        self,
        batch: Batch,
        watch: Watch | None = None,
        end: Block | None = None,
        instead: Mapping[str, str] | None = None,
    ) -> Pass:
        """A forward pass that is suspended wherever it is about to call a block, at (block, arguments).

        ``watch(module tree, suspend)`` is a further context of it, whose hooks come after the suspension and may call
        ``suspend(place)`` to stop elsewhere, too. What the block ``end``
        makes of its input is not computed: the pass ends there. Blocks whose paths are in ``instead`` are not computed,
        either: they give what the block of the path there has given before, if it has.
        """

        @contextmanager
        def suspending(model: nn.Module, suspend: Callable[[object], None]) -> Iterator[None]:
            depth: Counter[Block] = Counter()  # of calls: hooks that watch a block may call it themselves

            def enter(block: Block, module: nn.Module, args: tuple, kwargs: dict) -> None:
                depth[block] += 1
                if depth[block] == 1:
                    suspend((block, (args, kwargs)))

            def leave(block: Block, module: nn.Module, args: tuple, output: object) -> None:
                depth[block] -= 1

            for block in self.blocks:
                module = model.get_submodule(block.path)
                module.register_forward_pre_hook(partial(enter, block), with_kwargs=True)
                module.register_forward_hook(partial(leave, block))

            outputs: dict[str, object] = {}

            def recorded(block: Block, forward: Callable[..., object], *args, **kwargs) -> object:
                known = instead.get(block.path)
                output = outputs[known] if known in outputs else forward(*args, **kwargs)
                if block.path in instead.values():
                    outputs[block.path] = output
                return output

            for block in self.blocks if instead else ():
                module = model.get_submodule(block.path)
                module.forward = partial(recorded, block, module.forward)

            def stop(module: nn.Module, args: tuple) -> None:
                if depth[end] == 1:
                    raise GivenUp

            with watch(model, suspend) if watch else nullcontext():
                if end is not None:
                    model.get_submodule(end.path).register_forward_pre_hook(stop)
                yield

        return Pass(sharing_copy(self._model), suspending, self._forward, batch)

    def rehearse(self, batch: Batch, watch: Watch | None = None) -> list[Block]:
        """The blocks in the order in which the model calls them, found by one sample of ``batch`` and weights of zero;
        ``watch`` as of :meth:`run`.

        Raises whatever the model raises, one that uses the weights of a block outside of its call for example.
        """
        calls: list[Block] = []
        running = self.run(one_sample(batch), watch)
        try:
            block = self.resident
            while block:
                with self.loaded({**self.zeros(self.resident), **self.zeros(block)}.items()):
                    running.advance()
                block = running.at and running.at[0]
                calls += [block] if block else []
        finally:
            running.give_up()
        return calls

    def zeros(self, block: Block) -> dict[str, Tensor]:
        """Weights of ``block`` that take no memory."""
        parameters = (key for key in block.keys if isinstance(self._slots[key], nn.Parameter))
        return {key: torch.zeros(()).expand(self.shapes[key]) for key in parameters}


def _find_blocks(model: nn.Module, layers: list[Layer]) -> list[Block]:
    """The blocks that have entries in the state dict; and, last, what belongs to none of them."""
    stored = model.state_dict().keys()
    first: dict[int, str] = {}
    own: dict[str, list[str]] = {}  # module -> its own entries
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = f"{path}.{name}" if path else name
            if tensor is not None and key in stored:
                own.setdefault(path, []).append(first.setdefault(id(tensor), key))
    blocks: list[Block] = []
    covered: set[str] = set()
    merged: set[str] = set()

    def add(path: str, modules: list[str]) -> None:
        keys = tuple(dict.fromkeys(key for module in modules for key in own.get(module, ())))
        here = tuple(layer for layer in layers if layer.parameter in keys and layer.parameter not in merged)
        covered.update(modules)
        merged.update(keys)
        blocks.append(Block(path, keys, here, is_leaf=len(modules) == 1))

    for path in _block_paths("", model, set()):
        inside = model.get_submodule(path).named_modules(remove_duplicate=False)
        modules = [".".join(filter(None, (path, below))) for below, _ in inside]
        if any(module in own for module in modules):
            add(path, modules)
    add("", [module for module in own if module not in covered])
    return blocks


def _block_paths(path: str, module: nn.Module, seen: set[int]) -> Iterator[str]:
    """The elements of the outermost lists, and the largest modules beside them that contain no list."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if not any(isinstance(part, _LISTS) for part in module.modules()):
        yield path
        return
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if not isinstance(module, _LISTS):
            yield from _block_paths(below, child, seen)
        elif id(child) not in seen:
            seen.add(id(child))
            yield below


def _with_empty_parameters(model: nn.Module) -> nn.Module:
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False)
                module._parameters[name] = empty.setdefault(id(parameter), new)
    return model
