"""Feature drift: how far a merged model's layers move from the experts'."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from statsmerge_ext.layers import find_layers


def feature_drift(
    model: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    batches: Mapping[str, object],
    forward: Callable[[nn.Module, object], object],
) -> dict[str, float]:
    """‖Y − Y_k‖ / ‖Y_k‖ of the outputs of every linear and convolution layer, averaged over the experts.

    Args:
        model: the merged model; Y are its outputs on the batch of expert k.
        experts: name -> state dict; Y_k are that expert's outputs on the same batch.
        batches: name -> one batch of the expert's task.
        forward: runs a model on a batch.

    Returns:
        layer name -> drift, in the order in which the layers are called.
    """
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sums: dict[str, float] = {}
    for name, expert in experts.items():
        with _outputs(model) as ours, torch.inference_mode():
            forward(model, batches[name])
        try:
            model.load_state_dict(dict(expert), strict=False)
            with _outputs(model) as theirs, torch.inference_mode():
                forward(model, batches[name])
        finally:
            model.load_state_dict(state)
        for layer in ours:
            change = (ours[layer].double() - theirs[layer].double()).norm()
            size = theirs[layer].double().norm().clamp_min(torch.finfo(torch.float32).tiny)
            sums[layer] = sums.get(layer, 0.0) + float(change / size) / len(experts)
    return sums


@contextlib.contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The outputs of the modules that own a linear or convolution weight, filled in by the next forward pass."""
    outputs: dict[str, Tensor] = {}
    modules = {layer.module: layer.parameter for layer in find_layers(model) if layer.kind in ("linear", "conv")}
    handles = []
    for path, parameter in modules.items():

        def keep(module: nn.Module, args: tuple, output: object, parameter: str = parameter) -> None:
            output = output[0] if isinstance(output, tuple) else output
            outputs[parameter] = output.clone()  # an activation may work in place

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
