"""TIES merging (arXiv 2306.01708): trim, elect a sign, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.engine.thresholds import magnitude_thresholds
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.weights import expert_weights

#: Over what the share of entries that is kept is counted.
SCOPES = ("model", "layer")


@register_method("ties")
def ties(
    problem: MergeProblem,
    *,
    scaling_factor: float = 1.0,
    density: float | Sequence[float] = 0.2,
    weights: float | Sequence[float] | None = None,
    scope: str = "model",
    normalize: bool = True,
) -> Solution:
    """θ = θ_0 + λ · (mean of the trimmed task vectors' entries that have the elected sign).

    Args:
        scaling_factor: λ.
        density: share of each expert's entries, the largest in magnitude, that is kept; one for all, or one an expert.
        weights: how much each expert counts in election and mean; 1 by default.
        scope: the entries are the largest of the whole task vector ("model", the paper) or of each parameter ("layer",
            mergekit).
        normalize: take the weighted mean; else the weighted sum.

    Raises:
        MethodError: a density outside (0, 1], a wrong number of densities or weights, or an unknown scope.
    """
    shares = expert_weights(weights, len(problem.experts), 1.0)
    election = Election(problem, density, shares, scope)

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        return base + scaling_factor * joined(election.elected(task_vectors, piece.layer), shares, normalize)

    return problem.map_elements(merge)


class Election:
    """The first two steps of TIES: trimming task vectors, and electing the sign of every entry.

    Args:
        problem: the models.
        density, scope: as in :func:`ties`.
        weights: [K], how much each expert's entries count in the election; None: alike.

    Raises:
        MethodError: a density outside (0, 1], a wrong number of them, or an unknown scope.
    """

    def __init__(
        self,
        problem: MergeProblem,
        density: float | Sequence[float],
        weights: Tensor | None = None,
        scope: str = "model",
    ) -> None:
        if scope not in SCOPES:
            raise MethodError(f"scope: expected one of {SCOPES}, got {scope!r}")
        densities = expert_weights(density, len(problem.experts), 1.0, name="density").tolist()
        for value in densities:
            if not 0 < value <= 1:
                raise MethodError(f"density: expected a number in (0, 1], got {value}")
        self._weights = torch.ones(len(problem.experts)) if weights is None else weights
        if scope == "model":
            self._thresholds = dict.fromkeys(problem.layers, magnitude_thresholds(problem, problem.layers, densities))
        else:
            self._thresholds = {x: magnitude_thresholds(problem, [x], densities) for x in problem.layers}

    def elected(self, task_vectors: Sequence[Tensor], layer: Layer) -> list[Tensor]:
        """Entries of the task vectors of ``layer``, zero where they are trimmed or have lost the election."""
        trimmed = [t * (t.abs() >= cut) for t, cut in zip(task_vectors, self._thresholds[layer], strict=True)]
        return agreeing(trimmed, self._weights)


def agreeing(task_vectors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """The task vectors, zero where their sign is not that of their weighted sum."""
    weighted = [weight * t for weight, t in zip(weights.tolist(), task_vectors, strict=True)]
    sign = total(weighted).sign()
    return [t * (w * sign > 0) for t, w in zip(task_vectors, weighted, strict=True)]


def joined(task_vectors: Sequence[Tensor], weights: Tensor, normalize: bool) -> Tensor:
    """The weighted sum of the task vectors, or, entry by entry, the weighted mean of those that are not zero there."""
    shares = weights.tolist()
    merged = total([share * t for share, t in zip(shares, task_vectors, strict=True)])
    if not normalize:
        return merged
    counts = total([abs(share) * (t != 0).to(t.dtype) for share, t in zip(shares, task_vectors, strict=True)])
    return merged / counts.clamp_min_(torch.finfo(merged.dtype).tiny)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in their order."""
    return reduce(torch.add, tensors)
