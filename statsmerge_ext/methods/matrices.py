"""What the methods that know nothing but weight matrices share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.layers import Layer


def map_matrices(problem: MergeProblem, merge: Callable[[list[Tensor]], Tensor], scaling_factor: float) -> Solution:
    """θ = θ_0 + λ merge(τ_1, …, τ_K) for the weights of linear layers and convolutions, each τ_k as matrices
    [groups, out, in]; every other parameter is the experts' mean."""

    def merge_layer(layer: Layer, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        if layer.kind not in ("linear", "conv"):
            return base + torch.stack(task_vectors).mean(0)
        merged = merge([layer.matrices(task_vector) for task_vector in task_vectors])
        return base + scaling_factor * layer.from_matrices(merged, base.shape).to(base.dtype)

    return problem.map_layers(merge_layer)


def orthogonalised(left: Sequence[Tensor], values: Tensor, right: Sequence[Tensor]) -> Tensor:
    """U diag(``values``) V in float64, U and V being the orthonormal matrices nearest to all of ``left`` [groups, m, ·]
    side by side and to all of ``right`` [groups, ·, n] below each other."""
    return (polar_factor(torch.cat(left, -1)) * values.unsqueeze(-2)) @ polar_factor(torch.cat(right, -2))


def polar_factor(matrices: Tensor) -> Tensor:
    """U Vᵀ of the singular value decomposition U S Vᵀ of matrices [.., m, n], in float64: the nearest matrix with
    orthonormal rows or columns. Directions whose singular value is 1e-7 of the largest or less are left out."""
    if matrices.shape[-1] > matrices.shape[-2]:
        return polar_factor(matrices.mT).mT
    matrices = matrices.double()
    values, vectors = torch.linalg.eigh(matrices.mT @ matrices)
    kept = values > 1e-14 * values[..., -1:]
    roots = torch.where(kept, values, 1).rsqrt() * kept
    return matrices @ (vectors * roots.unsqueeze(-2)) @ vectors.mT
