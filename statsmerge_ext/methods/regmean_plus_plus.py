"""RegMean++ (arXiv 2508.03121): RegMean with the inputs that the merged model itself gives each layer."""

from __future__ import annotations

from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.layer_evidence import LayerEvidence
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.sequential import merge_in_execution_order
from statsmerge_ext.engine.solving import RESOLUTION
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.regmean import check_ratio, shrunken


@register_method("regmean_plus_plus", needs=("batches",), in_order=True)
def regmean_plus_plus(problem: MergeProblem, *, reduce_non_diagonal_ratio: float = 0.95) -> Solution:
    """W = (Σ W_k Ĝ_k)(Σ Ĝ_k)^† for linear and convolution weights in execution order, Ĝ_k being the Gram matrix of
    what the model merged so far makes of expert k's samples, off-diagonal entries multiplied by
    ``reduce_non_diagonal_ratio``. Embeddings are means by token counts, every other parameter is the experts' mean.

    Args:
        reduce_non_diagonal_ratio: α of the paper, 1 for no shrinkage.

    Raises:
        MethodError: a ratio outside [0, 1].
    """
    check_ratio(reduce_non_diagonal_ratio)

    def fit(evidence: LayerEvidence) -> tuple[Tensor, None] | None:
        if evidence.layer.kind == "scale":
            return None
        base = evidence.base.matrices.double()
        gram = product = 0.0
        for expert in evidence.experts:
            shrunk = shrunken(expert.moments.gram.double(), reduce_non_diagonal_ratio)
            gram = gram + shrunk
            product = product + (expert.map.matrices - base) @ shrunk
        # It is solved for the task vectors, which is the same: W_0 cancels out of both sides.
        return base + ops.layer_solve(gram, product, rcond=RESOLUTION).T, None

    return merge_in_execution_order(problem, fit, shifts=False, surroundings=False)
