"""Running a module with other models' weights without a copy of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def borrowing_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters have the module's memory, until :func:`borrow` gives them other; buffers are its own."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters() if type(p) is nn.Parameter
    }
    return copy.deepcopy(module, shared)


@torch.no_grad()
def borrow(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let the parameters of ``model``, a borrowing copy, have the memory of the tensors in ``state``, which are then
    only to be read. Buffers, which a forward pass may write to, are copied. What ``state`` lacks stays as it is."""
    for key, own in model.state_dict(keep_vars=True).items():
        if key not in state:
            continue
        if type(own) is nn.Parameter:
            own.data = state[key].detach().to(own)
        else:
            own.copy_(state[key])
