"""Essential Subspace Merging, ESM (arXiv 2602.20208)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evidence import collect_grams
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.matrices import polar_factor
from statsmerge_ext.methods.registry import register_method


@register_method("esm", needs=("batches",))
def esm(problem: MergeProblem, *, scaling_factor: float = 1.0, polarisation: float = 2.0) -> Solution:
    """θ = θ_0 + λ U V for each weight matrix. P_k are the r / K directions of most energy in what the task vector does
    to the outputs, the leading eigenvectors of τ_k X_kᵀ X_k τ_kᵀ with X_k the layer's inputs in expert k, r being the
    matrix's smaller dimension; U is the orthonormal matrix nearest to all P_k side by side, and V the one nearest to
    all P_kᵀ τ_k below each other, times the mean singular value of these. What is large is made larger, and what is
    small smaller, by factors (size / mean size)^p, sizes being Frobenius norms: of a task's τ_k among all tasks' before
    they are put together, then of every column, and in the end of a layer's U V among those of layers of the same kind
    and shape. Layers that not all experts call, those with fewer rows or columns than there are experts, and all other
    parameters take the mean.

    Args:
        scaling_factor: λ.
        polarisation: p; 0 for factors of 1.

    Raises:
        MethodError: a negative polarisation.
    """
    if not 0 <= polarisation < float("inf"):
        raise MethodError(f"polarisation: expected a number of at least 0, got {polarisation}")
    matrices = {layer: _merged(layer, problem, parts, polarisation) for layer, parts in _subspaces(problem).items()}
    sizes: dict[tuple, list[Tensor]] = {}
    for layer, merged in matrices.items():
        sizes.setdefault((layer.kind, merged.shape), []).append(merged.norm())
    means = {alike: torch.stack(of_layers).mean() for alike, of_layers in sizes.items()}

    def merge(layer: Layer, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        if layer not in matrices:
            return base + torch.stack(task_vectors).mean(0)
        merged = matrices[layer]
        factor = scaling_factor * _polarised(merged.norm(), means[layer.kind, merged.shape], polarisation)
        return base + layer.from_matrices(factor * merged, base.shape).to(base.dtype)

    return problem.map_layers(merge)


def _subspaces(problem: MergeProblem) -> dict[Layer, list[Tensor]]:
    """P_k [groups, out, r / K] of every expert, for the layers that have them; one expert's evidence at a time."""
    found: dict[Layer, list[Tensor]] = {}
    for name, state in problem.experts.items():
        samples = {name: problem.batches[name]}
        evidence = collect_grams(
            problem.model, problem.layers, problem.base, {name: state}, samples, forward=problem.forward
        )
        for layer in problem.layers:
            product = evidence.products.pop(layer.name, None)  # τ_k X_kᵀ X_k
            rank = 0 if product is None else min(product.shape[-2:]) // len(problem.experts)
            if rank:
                energies = product @ layer.matrices(problem.task_vector(layer, name)).to(product).mT
                found.setdefault(layer, []).append(ops.topk_svd(energies, rank, vectors=True).U)
    return {layer: subspaces for layer, subspaces in found.items() if len(subspaces) == len(problem.experts)}


def _merged(layer: Layer, problem: MergeProblem, subspaces: Sequence[Tensor], polarisation: float) -> Tensor:
    """U V [groups, out, in] before it is scaled."""
    task_vectors = [layer.matrices(task_vector).double() for task_vector in problem.task_vectors(layer)]
    sizes = torch.stack([task_vector.norm(dim=(-2, -1), keepdim=True) for task_vector in task_vectors])
    factors = _polarised(sizes, sizes.mean(0), polarisation)
    within = [f * (p.double().mT @ t) for f, p, t in zip(factors, subspaces, task_vectors, strict=True)]
    right = torch.cat(within, -2)
    columns = right.norm(dim=-2, keepdim=True)
    right = right * _polarised(columns, columns.mean(-1, keepdim=True), polarisation)
    return (_orthonormal(torch.cat(list(subspaces), -1).double()) @ _orthonormal(right)).to(subspaces[0])


def _orthonormal(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, times the mean of the singular values."""
    nearest = polar_factor(matrices)
    mean = (nearest * matrices).sum((-2, -1), keepdim=True) / min(matrices.shape[-2:])
    return mean * nearest


def _polarised(sizes: Tensor, mean: Tensor, exponent: float) -> Tensor:
    """(``sizes`` / their ``mean``)^``exponent``; 1 where all are 0."""
    return torch.where(mean > 0, sizes / mean, 1) ** exponent
