"""Weighted averaging of the experts' weights (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.weights import Weights, expert_weights


@register_method("linear", by_layer=True)
def linear(problem: MergeProblem, *, weights: Weights | None = None, normalize: bool = True) -> Solution:
    """θ = Σ_k w_k θ_k.

    Args:
        weights: w_k, one an expert or one for all; equal by default.
        normalize: divide by Σ_k w_k.

    Raises:
        MethodError: a wrong number of weights, or weights that sum to zero and shall be normalised.
    """
    coefficients = expert_weights(weights, problem, 1.0)
    if normalize:
        if (coefficients.sum(1) == 0).any():
            raise MethodError(f"weights: expected a sum other than 0 to normalise by, got {weights}")
        coefficients = coefficients / coefficients.sum(1, keepdim=True)
    rows = dict(zip(problem.layers, coefficients.float(), strict=True))
    # Σ w θ_k = θ_0 + Σ w τ_k + (Σ w − 1) θ_0
    rest = dict(zip(problem.layers, (coefficients.sum(1) - 1).tolist(), strict=True))
    sums_to_one = all(abs(of_layer) < 1e-9 for of_layer in rest.values())

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        (merged,) = ops.weighted_merge([base], [[t] for t in task_vectors], rows[piece.layer])
        return merged if sums_to_one else merged + rest[piece.layer] * base

    return problem.map_elements(merge, coefficients=coefficients, is_weighted_sum=sums_to_one)
