"""LOT Merging (layer-wise optimal task vectors, arXiv 2505.23859)."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.solving import LayerSolver
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import register_method


@register_method("lot", needs=("grams",), by_layer=True)
def lot(
    problem: MergeProblem, *, scaling_factor: float = 1.2, ridge: float = 1e-4, rcond: float | None = None
) -> Solution:
    """θ = θ_0 + λ T* with, for each layer, the T* that moves its outputs least from the experts'.

    Linear weights, and convolutions group by group on their patches: T* = (Σ T_k G_k)(Σ G_k)^† (Eq. 9). Norm scales:
    the mean of the T_k weighted by Σ x̂_k² for each channel (Eq. 12). Biases: the mean (Eq. 14). An embedding is a
    linear layer on one-hot inputs, so its rows are means weighted by token counts. Where there is no evidence (a row
    that no sample used, a layer that was never called, a bare parameter) it is the mean.

    The pseudo-inverse is taken of Σ G_k with a small ridge, which does the same for what the samples show and, where
    they show next to nothing, falls off instead of breaking off. A Cholesky factorisation then does, where the hard
    cut-off takes eigenvectors.

    Args:
        scaling_factor: λ; the paper uses 1.2 (ViT-B/32) and 1.5 (ViT-L/14).
        ridge: added to the eigenvalues of Σ G_k, as a part of their mean; 0 for the pseudo-inverse itself.
        rcond: with ridge=0, eigenvalues of Σ G_k up to rcond × the largest count as zero; None: the float32 epsilon.

    Raises:
        MethodError: a negative ridge, or a ridge and a cut-off at once.
    """
    evidence = problem.evidence
    solver = LayerSolver(problem, ridge=ridge, rcond=rcond)

    def merge(layer: Layer, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        if layer.name in evidence.leaders:
            return base + scaling_factor * solver.solve(layer, base)
        stacked = torch.stack(task_vectors)
        optimal = stacked.mean(0)
        if layer.name in evidence.weights:
            weights = evidence.weights[layer.name].to(stacked.dtype)
            weighted = (weights.reshape(*weights.shape, *[1] * (stacked.dim() - weights.dim())) * stacked).sum(0)
            optimal = ops.diagonal_solve(weights.sum(0), weighted, optimal)
        return base + scaling_factor * optimal

    return problem.map_layers(merge, alone=evidence.leaders, notes={"solutions": solver.quality})
