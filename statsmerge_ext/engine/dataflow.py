"""What becomes of each layer's output, found by running the model once.

Two things decide what a layer had best be fitted to: a BatchNorm that follows it at once, which is one affine map with
it, and a residual connection that its output is added to. Both are found from the identity of tensors, not from names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from statsmerge_ext.engine.affine import shifts_of
from statsmerge_ext.evidence.observe import Observation, observe
from statsmerge_ext.layers import Layer

_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_NORMS_OF_TORCH = (_BATCH_NORM, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Flow:
    """The surroundings of one layer.

    Attributes:
        calls: how often it is called in one forward pass.
        norm: the BatchNorm scale that reads its output and nothing else does before, or None.
        skip: the layer called before it whose input is added to its output, or to that of ``norm``; or None.
        offset: what a norm adds to its scale before it multiplies by it: 1 for the (1 + weight) form, else 0.
    """

    calls: int = 0
    norm: Layer | None = None
    skip: str | None = None
    offset: float = 0.0


def trace_dataflow(
    model: nn.Module, layers: list[Layer], forward: Callable[[nn.Module, object], object], batch: object
) -> dict[str, Flow]:
    """The flow of every layer of ``model`` that is called when it runs on ``batch``, in the order of first calls."""
    with torch.no_grad(), tracing(model, layers) as flows:
        forward(model, batch)
    return flows


@contextmanager
def tracing(model: nn.Module, layers: list[Layer]) -> Iterator[dict[str, Flow]]:
    """The flow of every layer that ``model`` calls while the context is open, complete when it is closed.

    It does not depend on the values of any tensors, so that weights may be zero.
    """
    tracer = _Tracer(model)
    handles = [
        # Before other hooks: it may call the module again, which is then still in its call.
        model.get_submodule(path).register_forward_hook(tracer.after_forward, with_kwargs=True, prepend=True)
        for path in {layer.module for layer in layers if layer.source and layer.kind != "conv"}
    ]
    try:
        with observe(model, layers, tracer.receive), tracer:
            yield tracer.flows
    finally:
        for handle in handles:
            handle.remove()
    for flow in tracer.flows.values():
        if flow.norm is not None and flow.calls + tracer.flows[flow.norm.name].calls > 2:
            flow.norm = None  # called again, elsewhere perhaps
        if flow.norm is not None and flow.skip is None:
            flow.skip = tracer.flows[flow.norm.name].skip


def flows_among(flows: Mapping[str, Flow], layers: list[Layer]) -> dict[str, Flow]:
    """``flows`` where only ``layers`` are to be merged: all others have no surroundings, and neither has a layer before
    a BatchNorm whose scale or shift is not among them."""
    names, shifts = {layer.name for layer in layers}, shifts_of(layers)

    def is_among(name: str, flow: Flow) -> bool:
        return name in names and (flow.norm is None or flow.norm.name in shifts)

    return {name: flow if is_among(name, flow) else replace(flow, norm=None, skip=None) for name, flow in flows.items()}


class _Tracer(TorchFunctionMode):
    """Remembers which tensors layers read and wrote, as they were then (every change in place counts a version)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flows: dict[str, Flow] = {}
        self._model = model
        # Tensors are not kept alive: what nobody holds any more is not added to anything.
        self._read: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._written: dict[int, tuple[weakref.ref[Tensor], int, Layer]] = {}
        self._called: Layer | None = None
        self._probing = False

    def receive(self, observation: Observation) -> None:
        if self._probing:
            return
        x = observation.input
        for layer in observation.layers:
            self.flows.setdefault(layer.name, Flow()).calls += 1
            self._called = layer
        source = self._of(self._written, x)
        module = self._model.get_submodule(self._called.module)
        if source is not None and _is_frozen(module):
            self.flows[source.name].norm = self._called
        if self._of(self._read, x) is None:
            self._read[id(x)] = (weakref.ref(x), x._version, self._called.name)

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if self._probing or self._called is None:
            return
        layer, self._called = self._called, None
        self._wrote(layer, output[0] if isinstance(output, tuple) else output)
        if layer.kind == "scale" and not isinstance(module, _NORMS_OF_TORCH):
            self._probing = True
            zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
            args, kwargs = tree_map(_ramp, (args, kwargs))
            self.flows[layer.name].offset = float(functional_call(module, zeros, args, kwargs).any())
            self._probing = False

    def _wrote(self, layer: Layer, output: object) -> None:
        if isinstance(output, Tensor):
            self._written[id(output)] = (weakref.ref(output), output._version, layer)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _ADDITIONS and len(args) == 2 and not kwargs:
            self._addition(*args)
        result = function(*args, **kwargs)
        if function in _CONVOLUTIONS and self._called is not None:
            self._wrote(self._called, result)
            self._called = None
        return result

    def _addition(self, a: object, b: object) -> None:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
            return
        order = list(self.flows)
        for output, other in ((a, b), (b, a)):
            layer, source = self._of(self._written, output), self._of(self._read, other)
            if layer is not None and source is not None and order.index(source) < order.index(layer.name):
                self.flows[layer.name].skip = source

    @staticmethod
    def _of(known: dict[int, tuple], tensor: Tensor):
        """What is known of ``tensor`` as it is now, or None."""
        entry = known.get(id(tensor))
        is_same = entry is not None and entry[0]() is tensor and entry[1] == tensor._version
        return entry[2] if is_same else None


def _ramp(value: object) -> object:
    """Something that a norm makes no zeros of, in the place of a floating-point tensor."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return value


def _is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm that scales and shifts by statistics of its own, not by its batch's."""
    frozen = isinstance(module, _BATCH_NORM) and module.running_var is not None and not module.training
    return frozen and module.bias is not None
