"""Isotropic merging in the common subspace, Iso-C (arXiv 2502.04959)."""

from __future__ import annotations

from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.methods.matrices import map_matrices, polar_factor
from statsmerge_ext.methods.registry import register_method


@register_method("iso_c", by_layer=True)
def iso_c(problem: MergeProblem, *, scaling_factor: float = 1.0) -> Solution:
    """θ = θ_0 + λ σ̄ U Vᵀ for each weight matrix, U S Vᵀ being the singular value decomposition of Σ_k τ_k and σ̄ the
    mean of S: all directions of the sum count alike, those that the tasks share no more than others. U Vᵀ is the polar
    factor P of the sum A, and σ̄ = ⟨P, A⟩ / r with r the smaller dimension. Other parameters are the experts' mean.

    Args:
        scaling_factor: λ.
    """

    def merge(task_vectors: list[Tensor]) -> Tensor:
        total = sum(task_vector.double() for task_vector in task_vectors)
        if not total.any():
            return total
        polar = polar_factor(total)
        mean = (polar * total).sum((-2, -1), keepdim=True) / min(total.shape[-2:])
        return mean * polar

    return map_matrices(problem, merge, scaling_factor)
