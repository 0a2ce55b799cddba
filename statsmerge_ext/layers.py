"""What a model is made of: its parameters as mergeable layers.

A layer is a parameter, or a part of one, together with the place in the model where the evidence for merging it is
seen: a linear weight with the inputs it multiplies, a norm scale with the normalised values it stretches, an embedding
with the rows that were looked up. Everything else has no evidence and takes the mean task vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from statsmerge_ext.checkpoints.compatibility import floating_names, shape_of

#: What a layer is. "other" is a parameter that no rule below knows (a bare ``nn.Parameter`` such as a class token).
KINDS = ("linear", "conv", "scale", "bias", "embedding", "other")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNEL_NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
#: Parts of the names that transformers gives to classes with the bare weights of a mixture of experts.
_MIXTURE_CLASSES = ("Experts", "Router")
#: Names under which a state dict alone, without its model, shows the statistics of a normalisation.
_BUFFER_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Layer:
    """One mergeable piece of a model.

    Attributes:
        name: unique name; the parameter's key, with a suffix such as ``[q]`` where a parameter holds several layers.
        parameter: key of the parameter in the model's state dict.
        kind: one of :data:`KINDS`.
        module: path of the module whose calls are watched for evidence; "" is the model itself.
        source: what is watched there: "input", "patches", "query", "key", "value", "attention" (the input of an
            attention's output projection), "normalised", "indices", "product" (the input of the linear function where
            it is called with the layer's weight), or "" where there is no evidence.
        rows: the rows [start, stop) of the parameter that are this layer, None for all of them.
        transposed: the parameter is stored [in, out] (transformers' ``Conv1D``).
        groups: number of groups of a convolution; each group is a matrix of its own.
        tied: further state dict keys under which the same parameter appears.
    """

    name: str
    parameter: str
    kind: str
    module: str = ""
    source: str = ""
    rows: tuple[int, int] | None = None
    transposed: bool = False
    groups: int = 1
    tied: tuple[str, ...] = ()

    def part(self, parameter: Tensor) -> Tensor:
        """This layer's view of its whole ``parameter``."""
        return parameter if self.rows is None else parameter[self.rows[0] : self.rows[1]]

    def in_rows(self, shape: torch.Size, elements: int) -> Iterator[Layer]:
        """This layer, of that ``shape``, in parts of a few rows with at most so many elements, or one row each; as it
        is, if it is as small."""
        first = 0 if self.rows is None else self.rows[0]
        step = max(1, elements // max(1, shape[1:].numel()))
        if not shape or shape[0] <= step:
            yield self
            return
        for start in range(first, first + shape[0], step):
            stop = min(start + step, first + shape[0])
            yield replace(self, name=f"{self.name}[{start}:{stop}]", rows=(start, stop))

    def matrices(self, part: Tensor) -> Tensor:
        """``part`` (what :meth:`part` gives) as matrices [groups, out / groups, in]."""
        if self.transposed:
            part = part.T
        if self.source == "product":  # one of a stack of matrices still has the stack's dimension
            return part.reshape(1, -1, part.shape[-1])
        return part.reshape(self.groups, part.shape[0] // self.groups, -1)

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`matrices`: ``matrices`` back in the part's own ``shape``."""
        if self.transposed:
            return matrices.reshape(shape[1], shape[0]).T.contiguous()
        return matrices.reshape(shape)


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of ``model``, in the order of its parameters; each parameter belongs to exactly one place.

    A tied parameter (an embedding that is also the output projection) is one layer, of the kind of the module that
    comes first in the model, with its other keys in ``tied``.
    """
    keys: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    claimed: dict[str, list[Layer]] = {}
    for path, module in model.named_modules():
        for local, layer in _module_layers(module):
            parameter = _attribute(module, local)
            if id(parameter) not in keys:  # computed from other parameters (a parametrisation): those are bare
                continue
            first, *tied = keys[id(parameter)]
            parts = claimed.setdefault(first, [])
            if not parts or parts[-1].module == path:
                name = first + layer.name
                parts.append(replace(layer, name=name, parameter=first, module=path, tied=tuple(tied)))
    layers = []
    for first, *tied in keys.values():
        kind = "bias" if first.rpartition(".")[2].endswith("bias") else "other"
        layers += claimed.get(first) or [Layer(name=first, parameter=first, kind=kind, tied=tuple(tied))]
    return layers


def layers_of_state(state: Mapping[str, Tensor]) -> list[Layer]:
    """The layers of a state dict whose model is not at hand: one a floating-point tensor, matrices being "linear".

    They carry no evidence, which is all that data-free methods need. The statistics of a BatchNorm are no layers.
    """
    return [
        Layer(name=key, parameter=key, kind="linear" if len(shape_of(state, key)) > 1 else "bias")
        for key in floating_names(state)
        if not key.endswith(_BUFFER_SUFFIXES)
    ]


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation with a scale: torch's own, or any leaf class named "…Norm"
    with a vector ``weight`` (transformers' RMSNorm classes)."""
    weight = getattr(module, "weight", None)
    if isinstance(module, (*CHANNEL_NORMS, nn.LayerNorm, nn.RMSNorm)):
        return weight is not None
    leaf = next(module.children(), None) is None
    return leaf and "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.dim() == 1


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D`` (a linear layer whose weight is [in, out]), known by its class
    name so that transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _attribute(module: nn.Module, path: str) -> object:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _module_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers that ``module`` itself defines: pairs of a parameter's path below it and a layer to complete, whose
    ``name`` holds only the suffix."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention_layers(module)
    elif isinstance(module, nn.Linear):
        yield "weight", Layer("", "", "linear", source="input")
    elif is_transposed_linear(module):
        yield "weight", Layer("", "", "linear", source="input", transposed=True)
    elif isinstance(module, _CONVOLUTIONS):
        yield "weight", Layer("", "", "conv", source="patches", groups=module.groups)
    elif isinstance(module, nn.Embedding):
        yield "weight", Layer("", "", "embedding", source="indices")
    elif is_norm(module):
        yield "weight", Layer("", "", "scale", source="normalised")
    elif any(part in type(module).__name__ for part in _MIXTURE_CLASSES):
        yield from _mixture_layers(module)


def _mixture_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The bare weights of a mixture of experts: those of all experts stacked in one parameter, and the router's."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3:
            for place in range(len(parameter)):
                yield name, Layer(f"[{place}]", "", "linear", source="product", rows=(place, place + 1))
        elif parameter.dim() == 2 and name == "weight":
            yield name, Layer("", "", "linear", source="product")


def _attention_layers(module: nn.MultiheadAttention) -> Iterator[tuple[str, Layer]]:
    width = module.embed_dim
    for place, (letter, source) in enumerate((("q", "query"), ("k", "key"), ("v", "value"))):
        if module.in_proj_weight is None:
            yield f"{letter}_proj_weight", Layer("", "", "linear", source=source)
        else:
            rows = (place * width, (place + 1) * width)
            yield "in_proj_weight", Layer(f"[{letter}]", "", "linear", source=source, rows=rows)
    # The projection's own forward is never called: the attention function takes its weight directly.
    yield "out_proj.weight", Layer("", "", "linear", source="attention")
