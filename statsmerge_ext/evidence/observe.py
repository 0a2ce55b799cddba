"""Watching the inputs of a model's layers during a forward pass.

:func:`observe` installs hooks and hands each layer's input, in the form its closed form needs, to a callback. The
callback decides what to do with it; nothing is kept here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from statsmerge_ext.layers import Layer

_LINEAR_FUNCTION = F.linear
_CONVOLUTION_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


@dataclass(frozen=True)
class Geometry:
    """How a convolution cuts patches from its input: the options of ``ops.gram_accumulate_patches_``."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def outputs(self, size: torch.Size) -> list[int]:
        """The convolution's output sizes for an input with spatial sizes ``size``."""
        sides = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [(n + sum(pad) - spread * (k - 1) - 1) // step + 1 for n, k, step, pad, spread in sides]


@dataclass(frozen=True)
class Observation:
    """The input of one or several layers in one call of their module.

    Attributes:
        layers: the layers of the module that read this input.
        input: the tensor as the model passed it. Layers that see the very same tensor share their evidence.
        view: how the features are cut from ``input``, where that is not the same for all layers; what must agree to
            share. A :class:`Geometry` for "patches".
        features: computes them: [..., in] for "input"-like sources, the input [N, C, *spatial] for "patches",
            [..., *scale shape] for "normalised", the indices themselves for "indices".
        tokens_first: the module's sequences are laid out [tokens, batch, …] instead of [batch, tokens, …].
        selected: the rows are some of all tokens, in an order of their own, that no mask fits.
    """

    layers: tuple[Layer, ...]
    input: Tensor
    view: Geometry | tuple
    features: Callable[[], Tensor]
    tokens_first: bool = False
    selected: bool = False

    def token_weight(self, mask: Tensor | None, tokens: torch.Size) -> Tensor | None:
        """A batch's attention ``mask`` [N, T] as factors of an input whose leading dimensions are ``tokens``; None
        where every row counts."""
        if mask is None or self.selected:
            return None
        if self.tokens_first:
            mask = mask.T
        if tokens == mask.shape:
            return mask
        if tokens == (mask.shape[0] * mask.shape[1],):
            return mask.flatten()
        if tokens == (1, mask.shape[1]):  # position indices, the same for the whole batch
            return mask.sum(0, keepdim=True)
        return None


@contextlib.contextmanager
def observe(model: nn.Module, layers: list[Layer], receive: Callable[[Observation], None]) -> Iterator[None]:
    """While the context is open, every call of a module of ``model`` that owns one of ``layers`` is reported.

    Convolutions are seen where torch is called, not where their module is: a subclass may pad in its own way. So are
    the experts of a mixture that share a module and its parameters.
    """
    watcher = _Watcher(receive)
    by_module: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.source:
            by_module.setdefault(layer.module, []).append(layer)
    handles = []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder kernels call no hooks
    try:
        for path, owned in by_module.items():
            module = model.get_submodule(path)
            if owned[0].source == "patches":
                watcher.convolutions[id(module.weight)] = tuple(owned)
            elif owned[0].source == "product":
                for layer in owned:
                    watcher.products.setdefault(id(model.get_parameter(layer.parameter)), []).append(layer)
            else:
                hook = watcher.hook(module, tuple(owned))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with watcher:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()


class _Watcher(TorchFunctionMode):
    """The hooks' shared state; as a function mode it sees convolutions, and products with bare weights."""

    def __init__(self, receive: Callable[[Observation], None]) -> None:
        super().__init__()
        self.receive = receive
        self.convolutions: dict[int, tuple[Layer, ...]] = {}
        self.products: dict[int, list[Layer]] = {}
        self.quiet = False  # set while a hook itself calls the module it watches

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _CONVOLUTION_FUNCTIONS:
            self._convolution(*args, **kwargs)
        elif function is _LINEAR_FUNCTION and self.products:
            self._product(*args, **kwargs)
        return function(*args, **kwargs)

    def _convolution(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> None:
        layers = self.convolutions.get(id(weight))
        if layers:
            dims = weight.dim() - 2
            geometry = Geometry(
                tuple(weight.shape[2:]),
                _tuple(stride, dims),
                _padding(padding, weight, dilation),
                _tuple(dilation, dims),
                groups,
            )
            batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
            self.receive(Observation(layers, input, geometry, lambda: batched))

    def _product(self, input, weight, bias=None) -> None:
        stack = weight if weight._base is None else weight._base
        layers = self.products.get(id(stack))
        if layers is None or stack.shape[-2:] != weight.shape:
            return
        place = (weight.storage_offset() - stack.storage_offset()) // weight.numel()
        self.receive(Observation((layers[place],), input, (), lambda: input, selected=stack.dim() == 3))

    def hook(self, module: nn.Module, layers: tuple[Layer, ...]):
        """The forward pre-hook of ``module``, which owns ``layers``."""
        observations = {
            "input": _of_input,
            "indices": _of_input,
            "normalised": _of_norm,
        }.get(layers[0].source, _of_attention)

        def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.quiet:
                return
            self.quiet = True
            try:
                for observation in observations(module, layers, args, kwargs):
                    self.receive(observation)
            finally:
                self.quiet = False

        return before_forward


def _of_input(module: nn.Module, layers: tuple[Layer, ...], args: tuple, kwargs: dict) -> Iterator[Observation]:
    x = _argument(args, kwargs, 0, "input", "x", "hidden_states")
    yield Observation(layers, x, (), lambda: x)


def _of_norm(module: nn.Module, layers: tuple[Layer, ...], args: tuple, kwargs: dict) -> Iterator[Observation]:
    x = _argument(args, kwargs, 0, "input", "x", "hidden_states")
    yield Observation(layers, x, (id(module),), lambda: normalised(module, args, kwargs))


def _of_attention(module: nn.Module, layers: tuple[Layer, ...], args: tuple, kwargs: dict) -> Iterator[Observation]:
    inputs = {name: _argument(args, kwargs, place, name) for place, name in enumerate(("query", "key", "value"))}
    # What the output projection receives is what the module returns when that projection is the identity.
    identity = {"out_proj.weight": torch.eye(module.embed_dim, dtype=module.out_proj.weight.dtype)}
    if module.out_proj.bias is not None:
        identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
    for layer in layers:
        if layer.source == "attention":
            x = functional_call(module, identity, args, kwargs)[0]
        else:
            x = inputs[layer.source]
        yield Observation((layer,), x, (), lambda x=x: x, tokens_first=not module.batch_first and x.dim() == 3)


def _argument(args: tuple, kwargs: dict, place: int, *names: str) -> Tensor:
    if len(args) > place:
        return args[place]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return next(value for value in kwargs.values() if isinstance(value, Tensor))


def normalised(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """What the scale of a normalisation multiplies, with the scale's dimensions last: a tensor of the caller's own.

    A normalisation's output is affine in its scale, so the difference of its outputs at scales one and zero is the
    normalised input, whatever the class: RMSNorm, the (1 + weight) form, GroupNorm and the like. torch's own LayerNorm,
    and BatchNorm with frozen statistics, take one pass over the input instead.
    """
    weight = module.weight
    if type(module) is nn.LayerNorm:
        x = _argument(args, kwargs, 0, "input")
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    batch_norm = nn.modules.batchnorm._BatchNorm
    if type(module).forward is batch_norm.forward and not module.training and module.running_var is not None:
        x = _argument(args, kwargs, 0, "input")
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps).movedim(1, -1)
    at_one, at_zero = (
        functional_call(module, {"weight": torch.full_like(weight, value)}, args, kwargs) for value in (1.0, 0.0)
    )
    x = at_one - at_zero
    trailing = x.shape[x.dim() - weight.dim() :] == weight.shape
    channels_first = isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)) or not trailing
    return x.movedim(1, -1) if channels_first else x


def _tuple(value, dims: int) -> tuple:
    return tuple(value) * (dims // len(value)) if isinstance(value, (tuple, list)) else (value,) * dims


def _padding(padding, weight: Tensor, dilation) -> tuple[tuple[int, int], ...]:
    """``padding`` as torch takes it ("same", "valid", a number or one a dimension) as pairs (before, after)."""
    dims = weight.dim() - 2
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(_tuple(dilation, dims), weight.shape[2:], strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((side, side) for side in _tuple(padding, dims))
