"""Isotropic merging in common and task-specific subspaces, Iso-CTS (arXiv 2502.04959)."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.matrices import map_matrices, orthogonalised
from statsmerge_ext.methods.registry import register_method


@register_method("iso_cts", by_layer=True)
def iso_cts(problem: MergeProblem, *, scaling_factor: float = 1.0, common_space_fraction: float = 0.8) -> Solution:
    """θ = θ_0 + λ σ̄ U Vᵀ for each weight matrix: as ``iso_c``, but the last singular directions of A = Σ_k τ_k make way
    for what single tasks have outside the space of the first ones. U_c are the leading left singular vectors of A; each
    task adds the leading singular triplets of τ_k − U_c U_cᵀ τ_k, all tasks the same number, so that together there are
    as many as the matrix's smaller dimension. U and V are the orthonormal matrices nearest to all left and all right
    vectors, σ̄ the mean of all singular values. Other parameters are the experts' mean.

    Args:
        scaling_factor: λ.
        common_space_fraction: the part of the directions that is A's own, nearly: the tasks' are a multiple of K.

    Raises:
        MethodError: a fraction outside (0, 1].
    """
    if not 0 < common_space_fraction <= 1:
        raise MethodError(f"common_space_fraction: expected a number in (0, 1], got {common_space_fraction}")

    def merge(task_vectors: list[Tensor]) -> Tensor:
        total = sum(task_vector.double() for task_vector in task_vectors)
        if not total.any():
            return total
        size, groups, count = min(total.shape[-2:]), len(total), len(task_vectors)
        specific = min(round((size - int(size * common_space_fraction)) / count), (size - 1) // count)
        common = ops.topk_svd(total, size - specific * count, vectors=True)
        triplets = [(common.U, common.S, common.Vh)]
        if specific:
            outside = [task_vector - common.U @ (common.U.mT @ task_vector.double()) for task_vector in task_vectors]
            own = ops.topk_svd(torch.cat(outside), specific, vectors=True)
            triplets += zip(*(part.split(groups) for part in (own.U, own.S, own.Vh)), strict=True)
        left, values, right = zip(*triplets, strict=True)
        mean = torch.cat(values, -1).mean(-1, keepdim=True)
        return orthogonalised(left, mean.expand(-1, size), right)

    return map_matrices(problem, merge, scaling_factor)
