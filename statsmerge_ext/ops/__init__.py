"""The native operators, each with its plain-torch reference beside it."""

from .gram import gram_accumulate_, gram_accumulate_patches_, symmetrize_
from .layer_solve import LayerSolution, diagonal_solve, layer_solve, layer_solve_features
from .quantized import QuantizedTensor
from .topk_svd import TopKSVD, topk_svd, weight_statistics
from .weighted_merge import prepare_task_vectors, weighted_merge

__all__ = [
    "LayerSolution",
    "QuantizedTensor",
    "TopKSVD",
    "diagonal_solve",
    "gram_accumulate_",
    "gram_accumulate_patches_",
    "layer_solve",
    "layer_solve_features",
    "prepare_task_vectors",
    "symmetrize_",
    "topk_svd",
    "weight_statistics",
    "weighted_merge",
]
