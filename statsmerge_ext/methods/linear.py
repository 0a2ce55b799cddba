"""Weighted averaging of the experts' weights (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.weights import expert_weights


@register_method("linear")
def linear(
    problem: MergeProblem, *, weights: float | Sequence[float] | None = None, normalize: bool = True
) -> Solution:
    """θ = Σ_k w_k θ_k.

    Args:
        weights: w_k, one an expert or one for all; equal by default.
        normalize: divide by Σ_k w_k.

    Raises:
        MethodError: a wrong number of weights, or weights that sum to zero and shall be normalised.
    """
    coefficients = expert_weights(weights, len(problem.experts), 1.0)
    if normalize:
        if coefficients.sum() == 0:
            raise MethodError(f"weights: expected a sum other than 0 to normalise by, got {coefficients.tolist()}")
        coefficients = coefficients / coefficients.sum()
    rest = float(coefficients.sum()) - 1.0  # Σ w θ_k = θ_0 + Σ w τ_k + (Σ w − 1) θ_0
    sums_to_one = abs(rest) < 1e-9

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        (merged,) = ops.weighted_merge([base], [[t] for t in task_vectors], coefficients.float())
        return merged if sums_to_one else merged + rest * base

    return problem.map_elements(merge, coefficients=coefficients, is_weighted_sum=sums_to_one)
