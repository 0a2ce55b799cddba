"""SWUDI (arXiv 2606.07289): WUDI's interference, minimised as far as its directions can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.spectral import effective_rank, gradient_descent, leading, mean_eigenvalue, spectral_solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.matrices import map_matrices
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.wudi import interference


@register_method("swudi", by_layer=True)
def swudi(problem: MergeProblem, *, scaling_factor: float = 1.0, time: float = 10.0) -> Solution:
    """θ = θ_0 + λ T with, for each weight matrix, T = A + (D − A C) Q diag(h_i / λ_i) Qᵀ, where T C = D are the normal
    equations of ``wudi``, Q and λ_i the eigenvectors and eigenvalues of C, and A = Σ τ_k is where gradients start from.

    h_i = 1 − exp(−t λ_i) is what gradient descent has solved of a direction after the time t. Of all directions only
    the (Σ λ_i)² / Σ λ_i² leading ones are solved, the effective rank of C: small eigenvalues amplify what the task
    vectors do not tell of their inputs. Other parameters are the experts' mean.

    Args:
        scaling_factor: λ.
        time: t, in units of one over C's mean eigenvalue.

    Raises:
        MethodError: a time that is not above 0.
    """
    if not time > 0:
        raise MethodError(f"time: expected a number above 0, got {time}")

    def merge(task_vectors: list[Tensor]) -> Tensor:
        gram, product = interference(task_vectors)
        start = sum(task_vector.double() for task_vector in task_vectors)
        mean = mean_eigenvalue(gram)
        scale = torch.where(mean > 0, mean, 1)
        return spectral_solution(gram / scale, product / scale, start, solved)

    def solved(values: Tensor) -> Tensor:
        return leading(values, effective_rank(values).ceil()) * gradient_descent(values, time)

    return map_matrices(problem, merge, scaling_factor)
