"""DARE (arXiv 2311.03099): drop entries of the task vectors at random, scale up the rest, and add them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import BLOCK, Piece
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.ties import agreeing, densities, joined
from statsmerge_ext.methods.weights import Weights, by_layer, expert_weights


@register_method("dare_linear")
def dare_linear(
    problem: MergeProblem,
    *,
    density: Weights = 0.5,
    scaling_factor: float = 1.0,
    weights: Weights | None = None,
    rescale: bool = True,
) -> Solution:
    """θ = θ_0 + λ Σ_k w_k m_k τ_k / density_k, each entry of the masks m_k being 1 with probability density_k, else 0.

    Args:
        density: share of each expert's entries that is kept; one for all, or one an expert.
        scaling_factor: λ.
        weights: w_k, one an expert or one for all; 1 / K by default.
        rescale: divide by the density, so that the expectation stays the same.

    Raises:
        MethodError: a density outside (0, 1], or a wrong number of densities or weights.
    """
    table = expert_weights(weights, problem, 1 / len(problem.experts))
    shares = by_layer(problem.layers, table)
    drop = _Drop(problem, density, rescale)

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        return base + scaling_factor * joined(drop(piece, task_vectors), shares[piece.layer], normalize=False)

    return problem.map_elements(merge, coefficients=scaling_factor * table)


@register_method("dare_ties")
def dare_ties(
    problem: MergeProblem,
    *,
    density: Weights = 0.5,
    scaling_factor: float = 1.0,
    weights: Weights | None = None,
    rescale: bool = True,
    normalize: bool = False,
) -> Solution:
    """As ``dare_linear``, but of what is kept only entries with the sign that TIES elects are added.

    Args:
        density, scaling_factor, rescale: as in ``dare_linear``.
        weights: w_k, 1 by default if ``normalize``, else 1 / K.
        normalize: take the weighted mean of the entries that are left; else the weighted sum.

    Raises:
        MethodError: as ``dare_linear``.
    """
    table = expert_weights(weights, problem, 1.0 if normalize else 1 / len(problem.experts))
    shares = by_layer(problem.layers, table)
    drop = _Drop(problem, density, rescale)

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        of_layer = shares[piece.layer]
        return base + scaling_factor * joined(agreeing(drop(piece, task_vectors), of_layer), of_layer, normalize)

    return problem.map_elements(merge)


class _Drop:
    """Random masks that depend on seed, expert and place alone, whatever pieces the models come in."""

    def __init__(self, problem: MergeProblem, density: Weights, rescale: bool) -> None:
        self._densities = densities(density, problem)
        self._experts, self._seed, self._rescale = list(problem.experts), problem.seed, rescale

    def __call__(self, piece: Piece, task_vectors: list[Tensor]) -> list[Tensor]:
        kept = []
        for name, density, task_vector in zip(self._experts, self._densities[piece.layer], task_vectors, strict=True):
            mask = self._uniform(piece, name).to(task_vector.device) < density
            kept.append(task_vector * mask / density if self._rescale else task_vector * mask)
        return kept

    def _uniform(self, piece: Piece, expert: str) -> Tensor:
        """[count] numbers in [0, 1): each :data:`BLOCK` elements of a layer have a generator of their own."""
        numbers = []
        for first in range(piece.first, piece.first + piece.count, BLOCK):
            key = f"{self._seed}:{expert}:{piece.layer.name}:{first}".encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
            count = min(BLOCK, piece.first + piece.count - first)
            numbers.append(torch.rand(BLOCK, generator=torch.Generator().manual_seed(seed))[:count])
        return torch.cat(numbers) if numbers else torch.empty(0)
