"""Task arithmetic (arXiv 2212.04089): the base plus a scaled sum of the task vectors."""

from __future__ import annotations

from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.weights import Weights, expert_weights


@register_method("task_arithmetic", by_layer=True)
def task_arithmetic(problem: MergeProblem, *, scaling_factor: float = 0.3, weights: Weights | None = None) -> Solution:
    """θ = θ_0 + λ Σ_k w_k τ_k.

    Args:
        scaling_factor: λ.
        weights: w_k, one an expert or one for all; 1 by default.

    Raises:
        MethodError: a wrong number of weights.
    """
    coefficients = scaling_factor * expert_weights(weights, problem, 1.0)
    rows = dict(zip(problem.layers, coefficients.float(), strict=True))

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        (merged,) = ops.weighted_merge([base], [[t] for t in task_vectors], rows[piece.layer])
        return merged

    return problem.map_elements(merge, coefficients=coefficients, is_weighted_sum=True)
