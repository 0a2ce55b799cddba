"""TIES merging (arXiv 2306.01708): trim, elect a sign, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.engine.thresholds import magnitude_thresholds
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.weights import Weights, by_layer, expert_weights

#: Over what the share of entries that is kept is counted.
SCOPES = ("model", "layer")


@register_method("ties")
def ties(
    problem: MergeProblem,
    *,
    scaling_factor: float = 1.0,
    density: Weights = 0.2,
    weights: Weights | None = None,
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
        MethodError: a density outside (0, 1] or, for the scope "model", not the same in all layers; a wrong number of
            densities or weights; an unknown scope.
    """
    shares = by_layer(problem.layers, expert_weights(weights, problem, 1.0))
    election = Election(problem, density, shares, scope)

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        return base + scaling_factor * joined(
            election.elected(task_vectors, piece.layer), shares[piece.layer], normalize
        )

    return problem.map_elements(merge)


class Election:
    """The first two steps of TIES: trimming task vectors, and electing the sign of every entry.

    Args:
        problem: the models.
        density, scope: as in :func:`ties`.
        weights: layer -> how much each expert's entries count in the election; None: alike.

    Raises:
        MethodError: as :func:`ties`.
    """

    def __init__(
        self,
        problem: MergeProblem,
        density: Weights,
        weights: Mapping[Layer, Sequence[float]] | None = None,
        scope: str = "model",
    ) -> None:
        if scope not in SCOPES:
            raise MethodError(f"scope: expected one of {SCOPES}, got {scope!r}")
        table = densities(density, problem)
        self._weights = weights or dict.fromkeys(problem.layers, [1.0] * len(problem.experts))
        if scope == "layer":
            self._thresholds = {
                layer: magnitude_thresholds(problem, [layer], of_layer) for layer, of_layer in table.items()
            }
            return
        rows = list(table.values())
        if any(row != rows[0] for row in rows):
            raise MethodError("density: one that differs from layer to layer needs the scope 'layer'")
        thresholds = magnitude_thresholds(problem, problem.layers, rows[0]) if rows else []
        self._thresholds = dict.fromkeys(problem.layers, thresholds)

    def elected(self, task_vectors: Sequence[Tensor], layer: Layer) -> list[Tensor]:
        """Entries of the task vectors of ``layer``, zero where they are trimmed or have lost the election."""
        trimmed = [t * (t.abs() >= cut) for t, cut in zip(task_vectors, self._thresholds[layer], strict=True)]
        return agreeing(trimmed, self._weights[layer])


def agreeing(task_vectors: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """The task vectors, zero where their sign is not that of their weighted sum."""
    weighted = [weight * t for weight, t in zip(weights, task_vectors, strict=True)]
    sign = total(weighted).sign()
    return [t * (w * sign > 0) for t, w in zip(task_vectors, weighted, strict=True)]


def joined(task_vectors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """The weighted sum of the task vectors, or, entry by entry, the weighted mean of those that are not zero there."""
    merged = total([weight * t for weight, t in zip(weights, task_vectors, strict=True)])
    if not normalize:
        return merged
    counts = total([abs(weight) * (t != 0).to(t.dtype) for weight, t in zip(weights, task_vectors, strict=True)])
    return merged / counts.clamp_min_(torch.finfo(merged.dtype).tiny)


def densities(density: Weights, problem: MergeProblem) -> dict[Layer, list[float]]:
    """Layer -> the share of each expert's entries that is kept. Raises MethodError for one outside (0, 1]."""
    table = by_layer(problem.layers, expert_weights(density, problem, 1.0, name="density"))
    for value in (value for row in table.values() for value in row):
        if not 0 < value <= 1:
            raise MethodError(f"density: expected a number in (0, 1], got {value}")
    return table


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in their order."""
    return reduce(torch.add, tensors)
