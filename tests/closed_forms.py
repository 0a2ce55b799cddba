"""Float64 references for the closed forms, computed from raw features without any Gram matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS = ("a", "b", "c")


class Wrapper(nn.Module):
    """A model that is one module, or a function of one."""

    def __init__(self, module: nn.Module, call: Callable | None = None) -> None:
        super().__init__()
        self.module = module
        self._call = call or (lambda module, x: module(x))

    def forward(self, x):
        return self._call(self.module, x)


def fine_tuned(base: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """A copy of ``base`` whose parameters have moved by a random task vector."""
    expert = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return expert


def make_experts(base: nn.Module) -> dict[str, nn.Module]:
    return {name: fine_tuned(base, seed) for seed, name in enumerate(EXPERTS)}


def least_squares(features: list[Tensor], task_vectors: list[Tensor]) -> Tensor:
    """The least-norm T of min Σ_k ‖X_k Tᵀ − X_k T_kᵀ‖², from X_k [tokens, in] and T_k [out, in], in float64."""
    x = torch.cat([f.double() for f in features])
    y = torch.cat([f.double() @ t.double().T for f, t in zip(features, task_vectors, strict=True)])
    return (torch.linalg.pinv(x, rtol=1e-7) @ y).T


def grouped_patches(x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    """The unfolded patches of each group [tokens, in / groups · kernel], by ``F.unfold``."""
    columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # [N, C · kernel, tokens]
    return list(columns.transpose(1, 2).flatten(0, 1).chunk(conv.groups, 1))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())
