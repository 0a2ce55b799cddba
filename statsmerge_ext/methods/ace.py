"""ACE-Merging (arXiv 2603.02945): RegMean with covariances of the inputs that are estimated from the task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.matrices import map_matrices
from statsmerge_ext.methods.registry import register_method

# Tasks differ in size if the variance of the logarithms of ‖τ_k‖² is above this part of their squared mean.
_HETEROGENEOUS = 0.3
_TINY = 1e-12


@register_method("ace", by_layer=True)
def ace(
    problem: MergeProblem, *, scaling_factor: float = 1.0, ridge: float = 1e-2, refined_fraction: float = 0.3
) -> Solution:
    """θ = θ_0 + λ T with, for each weight matrix, T = (Σ T_k (S_k + ε I)) (Σ (S_k + ε I) + 1 cᵀ)⁻¹. T_k is τ_k less the
    mean of its rows, S_k = T_kᵀ T_k stands for the covariance of task k's inputs, and c, the mean row of Σ S_k, for
    what these have in common.

    Where the tasks' ‖τ_k‖² differ much, S_k + ε I is divided by the trace of S_k and c by the mean ‖τ_k‖², and the part
    that tasks do not agree on is put back with equal weights: T += σ̄ U_r V_rᵀ, with the leading singular vectors and
    the mean σ̄ of the leading singular values of T + Σ τ_k (S_k − Σ_j (S_j + ε I) / K). This is as in the authors'
    code. Other parameters, and matrices of a single row, are the experts' mean.

    Args:
        scaling_factor: λ.
        ridge: ε, absolute.
        refined_fraction: the part of the singular values that counts as leading.

    Raises:
        MethodError: a ridge that is not above 0, or a fraction outside (0, 1].
    """
    if not 0 < ridge < float("inf"):
        raise MethodError(f"ridge: expected a number above 0, got {ridge}")
    if not 0 < refined_fraction <= 1:
        raise MethodError(f"refined_fraction: expected a number in (0, 1], got {refined_fraction}")

    def merge(task_vectors: list[Tensor]) -> Tensor:
        task_vectors = [task_vector.double() for task_vector in task_vectors]
        if task_vectors[0].shape[-2] == 1:
            return torch.stack(task_vectors).mean(0)
        energies = torch.stack([task_vector.square().sum() for task_vector in task_vectors])
        logarithms = (energies + _TINY).log()
        differ = bool(logarithms.var() > _HETEROGENEOUS * logarithms.mean().square())
        gram = product = shift = own_product = 0.0
        for task_vector in task_vectors:
            rows = task_vector - task_vector.mean(-2, keepdim=True)
            own = rows.mT @ rows
            part = 1 / (rows.square().sum() + _TINY) if differ else 1.0
            gram, shift = gram + part * own, shift + part * ridge
            product = product + part * (rows @ own + ridge * rows)
            own_product = own_product + part * (task_vector @ own)
        common = gram.mean(-2, keepdim=True) / (energies.mean() + _TINY if differ else 1)
        solved, direction = ops.layer_solve(gram, [product, common], filter="ridge", ridge=float(shift)).T
        # (C + 1 cᵀ)⁻¹ from C⁻¹, after Sherman and Morrison.
        merged = solved - solved.sum(-1, keepdim=True) * direction / (1 + direction.sum(-1, keepdim=True))
        if differ:
            total = sum(task_vectors)
            residual = merged + own_product - (total @ gram + shift * total) / len(task_vectors)
            leading = max(1, int(refined_fraction * min(residual.shape[-2:])))
            svd = ops.topk_svd(residual, leading, vectors=True)
            merged = merged + svd.S.mean(-1)[:, None, None] * (svd.U @ svd.Vh)
        return merged

    return map_matrices(problem, merge, scaling_factor)
