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
    shares = expert_weights(weights, len(problem.experts), 1.0).float()
    election = Election(problem, density, shares)

    def merge(layer: Layer, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        elected = torch.stack(election.elected(task_vectors))
        of_expert = shares.to(elected).view(-1, *[1] * base.dim())
        counts = (of_expert.abs() * (elected != 0)).sum(0)
        return base + scaling_factor * (of_expert * elected).sum(0) / counts.clamp_min(torch.finfo(base.dtype).tiny)

    return problem.map_layers(merge)


class Election:
    """The first two steps of TIES: trimming task vectors, and electing the sign of every entry.

    Args:
        problem: the models.
        density: as in :func:`ties`.
        weights: [K], how much each expert's entries count in the election; None: alike.

    Raises:
        MethodError: a density outside (0, 1].
    """

    def __init__(self, problem: MergeProblem, density: float, weights: Tensor | None = None) -> None:
        if not 0 < density <= 1:
            raise MethodError(f"density: expected a number in (0, 1], got {density}")
        self._weights = torch.ones(len(problem.experts)) if weights is None else weights
        self._thresholds = [_threshold(problem, name, density) for name in problem.experts]

    def elected(self, task_vectors: Sequence[Tensor]) -> list[Tensor]:
        """The task vectors of one layer with zeros for all entries that are trimmed or have lost the election."""
        trimmed = [t * (t.abs() >= cut) for t, cut in zip(task_vectors, self._thresholds, strict=True)]
        weighted = [weight * t for weight, t in zip(self._weights.tolist(), trimmed, strict=True)]
        sign = torch.stack(weighted).sum(0).sign()
        return [t * (w * sign > 0) for t, w in zip(trimmed, weighted, strict=True)]


def _threshold(problem: MergeProblem, name: str, density: float) -> float:
    """The least magnitude among the share ``density`` of an expert's task vector that is kept."""
    magnitudes = torch.cat([problem.task_vector(layer, name).abs().flatten() for layer in problem.layers])
    kept = max(1, round(density * magnitudes.numel()))
    return float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values)
