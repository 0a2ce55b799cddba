"""SWUDI (arXiv 2606.07289): WUDI's interference, minimised as far as its directions can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.matrices import map_matrices
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.wudi import interference


@register_method("swudi")
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
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        scale = torch.where(values.any(-1, keepdim=True), values.mean(-1, keepdim=True), 1)
        values = values / scale
        rank = values.sum(-1, keepdim=True).square() / values.square().sum(-1, keepdim=True)
        places = torch.arange(values.shape[-1], 0, -1, device=values.device)  # 1 for the largest, which is the last
        solved = torch.where((places <= rank.ceil()) & (values > 0), -torch.expm1(-time * values) / values, 0)
        return start + ((product - start @ gram) @ vectors * (solved / scale).unsqueeze(-2)) @ vectors.mT

    return map_matrices(problem, merge, scaling_factor)
