"""RegMean (arXiv 2212.09849): the linear regression of the experts' outputs on their inputs, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.solving import LayerSolver
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import register_method


@register_method("regmean", needs=("grams",), by_layer=True)
def regmean(problem: MergeProblem, *, reduce_non_diagonal_ratio: float = 0.95, rcond: float | None = None) -> Solution:
    """W = (Σ W_k Ĝ_k)(Σ Ĝ_k)^† for linear and convolution weights, Ĝ_k being G_k with its off-diagonal entries
    multiplied by ``reduce_non_diagonal_ratio``; every other parameter is the experts' mean.

    It is solved for the task vectors, which is the same: W_0 cancels out of both sides.

    Args:
        reduce_non_diagonal_ratio: α of the paper, 1 for no shrinkage.
        rcond: as in ``lot``.

    Raises:
        MethodError: a ratio outside [0, 1].
    """
    check_ratio(reduce_non_diagonal_ratio)
    evidence, alpha = problem.evidence, reduce_non_diagonal_ratio

    def shrink(leader: str, gram: Tensor) -> Tensor:
        return shrunken(gram, alpha)

    def shrink_product(layer: Layer, product: Tensor) -> Tensor:
        # Σ T_k Ĝ_k = α Σ T_k G_k + (1 − α) Σ T_k diag(G_k): the Gram matrices themselves are not needed again.
        diagonals = evidence.diagonals[evidence.leaders[layer.name]]
        shrunk = alpha * product
        for name, diagonal in zip(problem.experts, diagonals, strict=True):
            task_vector = layer.matrices(problem.task_vector(layer, name)).to(product.dtype)
            shrunk += (1 - alpha) * task_vector * diagonal.unsqueeze(-2)
        return shrunk

    solver = LayerSolver(problem, rcond=rcond, shrink=shrink, shrink_product=shrink_product)

    def merge(layer: Layer, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        if layer.name in evidence.leaders:
            return base + solver.solve(layer, base)
        return base + torch.stack(task_vectors).mean(0)

    return problem.map_layers(merge, alone=evidence.leaders, notes={"solutions": solver.quality})


def check_ratio(reduce_non_diagonal_ratio: float) -> None:
    """Raise MethodError for a ratio outside [0, 1]."""
    if not 0 <= reduce_non_diagonal_ratio <= 1:
        raise MethodError(f"reduce_non_diagonal_ratio: expected a number in [0, 1], got {reduce_non_diagonal_ratio}")


def shrunken(gram: Tensor, alpha: float) -> Tensor:
    """Ĝ: Gram matrices [.., in, in] with the entries off their diagonals multiplied by ``alpha``."""
    return alpha * gram + (1 - alpha) * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
