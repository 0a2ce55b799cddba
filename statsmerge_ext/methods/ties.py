"""TIES merging (arXiv 2306.01708): trim, elect a sign, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.weights import expert_weights


@register_method("ties")
def ties(
    problem: MergeProblem,
    *,
    scaling_factor: float = 1.0,
    density: float = 0.2,
    weights: float | Sequence[float] | None = None,
) -> Solution:
    """θ = θ_0 + λ · (mean of the trimmed task vectors' entries that have the elected sign).

    Args:
        scaling_factor: λ.
        density: share of each expert's entries, the largest in magnitude over the whole task vector, that is kept.
        weights: how much each expert counts in election and mean; 1 by default.

    Raises:
        MethodError: a density outside (0, 1], or a wrong number of weights.
    """
    if not 0 < density <= 1:
        raise MethodError(f"density: expected a number in (0, 1], got {density}")
    shares = expert_weights(weights, len(problem.experts), 1.0).float()
    thresholds = [_threshold(problem, name, density) for name in problem.experts]

    def merge(layer: Layer, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        trimmed = torch.stack([t * (t.abs() >= cut) for t, cut in zip(task_vectors, thresholds, strict=True)])
        weighted = trimmed * shares.to(trimmed).view(-1, *[1] * base.dim())
        agrees = (weighted * weighted.sum(0).sign() > 0).to(trimmed)
        counts = torch.einsum("k,k...->...", shares.to(trimmed).abs(), agrees)
        return base + scaling_factor * (weighted * agrees).sum(0) / counts.clamp_min(torch.finfo(base.dtype).tiny)

    return problem.map_layers(merge)


def _threshold(problem: MergeProblem, name: str, density: float) -> float:
    """The least magnitude among the share ``density`` of an expert's task vector that is kept."""
    magnitudes = torch.cat([problem.task_vector(layer, name).abs().flatten() for layer in problem.layers])
    kept = max(1, round(density * magnitudes.numel()))
    return float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values)
