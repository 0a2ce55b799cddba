"""Task Singular Vectors merging, TSV-M (arXiv 2412.00081)."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.methods.matrices import map_matrices, orthogonalised
from statsmerge_ext.methods.registry import register_method


@register_method("tsv_m", by_layer=True)
def tsv_m(problem: MergeProblem, *, scaling_factor: float = 1.0) -> Solution:
    """θ = θ_0 + λ U' S V'ᵀ for each weight matrix: the r / K leading singular triplets of every τ_k side by side, with
    all left singular vectors, and all right ones, replaced by the nearest orthonormal ones, so that tasks do not
    interfere. r is the matrix's smaller dimension. A matrix with fewer rows or columns than there are experts has no
    room for that and takes the mean, as other parameters do.

    Args:
        scaling_factor: λ.
    """

    def merge(task_vectors: list[Tensor]) -> Tensor:
        rank = min(task_vectors[0].shape[-2:]) // len(task_vectors)
        if rank == 0:
            return torch.stack(task_vectors).mean(0)
        decomposed = ops.topk_svd(torch.cat(task_vectors), rank, vectors=True)
        groups = len(task_vectors[0])
        left, values, right = (part.split(groups) for part in (decomposed.U, decomposed.S, decomposed.Vh))
        return orthogonalised(left, torch.cat(values, -1).double(), right)

    return map_matrices(problem, merge, scaling_factor)
