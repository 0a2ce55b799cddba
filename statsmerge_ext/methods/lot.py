"""LOT Merging (layer-wise optimal task vectors, arXiv 2505.23859)."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.solving import LayerSolver
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import register_method


@register_method("lot", needs=("grams",))
def lot(problem: MergeProblem, *, scaling_factor: float = 1.2, rcond: float | None = None) -> Solution:
    """θ = θ_0 + λ T* with, for each layer, the T* that moves its outputs least from the experts'.

    Linear weights, and convolutions group by group on their patches: T* = (Σ T_k G_k)(Σ G_k)^† (Eq. 9). Norm scales:
    the mean of the T_k weighted by Σ x̂_k² for each channel (Eq. 12). Biases: the mean (Eq. 14). An embedding is a
    linear layer on one-hot inputs, so its rows are means weighted by token counts. Where there is no evidence (a row
    that no sample used, a layer that was never called, a bare parameter) it is the mean.

    Args:
        scaling_factor: λ; the paper uses 1.2 (ViT-B/32) and 1.5 (ViT-L/14).
        rcond: eigenvalues of Σ G_k up to rcond × the largest count as zero; None: the float32 epsilon.
    """
    evidence = problem.evidence
    solver = LayerSolver(problem, rcond=rcond)

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

    return problem.map_layers(merge, notes={"solutions": solver.quality})
