"""WUDI-Merging (arXiv 2503.08099) in closed form: LOT's problem with the task vectors themselves as features."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.spectral import mean_eigenvalue
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.matrices import map_matrices
from statsmerge_ext.methods.registry import register_method


@register_method("wudi", by_layer=True)
def wudi(problem: MergeProblem, *, scaling_factor: float = 1.0, ridge: float = 1e-6) -> Solution:
    """θ = θ_0 + λ T with, for each weight matrix, the T of least norm in min Σ_k ‖(T − τ_k) τ_kᵀ‖² / ‖τ_k‖².

    A task vector's rows lie in the space of the inputs it was trained on, so that T interferes least with what each
    expert learned, without any data: T C = D with C = Σ τ_kᵀ τ_k / ‖τ_k‖² and D = Σ τ_k τ_kᵀ τ_k / ‖τ_k‖². The paper
    descends this loss by gradients from Σ τ_k; here it is solved. Other parameters are the experts' mean.

    Args:
        scaling_factor: λ.
        ridge: added to the eigenvalues of C, as a part of their mean: directions that no task vector has stay zero.

    Raises:
        MethodError: a ridge that is not above 0.
    """

    if not 0 < ridge < float("inf"):
        raise MethodError(f"ridge: expected a number above 0, got {ridge}")

    def merge(task_vectors: list[Tensor]) -> Tensor:
        gram, product = interference(task_vectors)
        mean = mean_eigenvalue(gram)
        mean = torch.where(mean > 0, mean, 1)
        return ops.layer_solve(gram / mean, product / mean, filter="ridge", ridge=ridge).T

    return map_matrices(problem, merge, scaling_factor)


def interference(task_vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """C = Σ τ_kᵀ τ_k / ‖τ_k‖² and D = Σ τ_k τ_kᵀ τ_k / ‖τ_k‖² in float64, of matrices [groups, out, in]; ‖τ_k‖ is that
    of all groups together."""
    groups, _, columns = task_vectors[0].shape
    gram = task_vectors[0].new_zeros(groups, columns, columns, dtype=torch.float64)
    product = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    for task_vector in task_vectors:
        if task_vector.any():
            unit = task_vector / task_vector.norm()
            own = ops.symmetrize_(ops.gram_accumulate_(torch.zeros_like(gram), unit))
            ops.gram_accumulate_(product, task_vector.mT.contiguous(), other=own)
            gram += own
    return gram, product
