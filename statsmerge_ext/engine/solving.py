"""Solving T · C = D for layers that share their Gram matrix, with one factorisation for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer

#: Features are float32 whatever their Gram matrix is: what is smaller than this part of the rest is rounding.
RESOLUTION = torch.finfo(torch.float32).eps


class LayerSolver:
    """Task vectors T with T · C = D, layer by layer, each once.

    Args:
        problem: its evidence holds C and D, which are dropped as soon as they are solved: they are as large as models.
        shrink: (leader, C) -> C, and
        shrink_product: (layer, D) -> D: what a method makes of them before solving.
        ridge: what is added to the eigenvalues of C, as a part of their mean.
        rcond: with no ridge, eigenvalues of C up to rcond × the largest count as zero. None: the float32 epsilon.

    Raises:
        MethodError: a negative ridge, or a ridge and a cut-off at once.
    """

    def __init__(
        self,
        problem: MergeProblem,
        *,
        ridge: float = 0.0,
        rcond: float | None = None,
        shrink: Callable[[str, Tensor], Tensor] = lambda leader, gram: gram,
        shrink_product: Callable[[Layer, Tensor], Tensor] = lambda layer, product: product,
    ) -> None:
        if rcond is None:
            rcond = RESOLUTION
        elif ridge > 0:
            raise MethodError(f"rcond: expected None with a ridge, got {rcond}; pass ridge=0 for the pseudo-inverse")
        if not 0 <= ridge < float("inf"):
            raise MethodError(f"ridge: expected a number of at least 0, got {ridge}")
        self._evidence = problem.evidence
        self._shrink, self._shrink_product = shrink, shrink_product
        # The rounding of float32 sums stays well below this part of the largest eigenvalue, and the ridge above it.
        self._cut_off = RESOLUTION / 8 if ridge > 0 else rcond
        self._ridge = ridge
        self._members: dict[str, list[Layer]] = {}
        for layer in problem.layers:
            if layer.name in self._evidence.leaders:
                self._members.setdefault(self._evidence.leaders[layer.name], []).append(layer)
        self._solved: dict[str, Tensor] = {}
        #: layer -> {"features", "rank", "condition"} of its Gram matrix, of the worst group of a convolution.
        self.quality: dict[str, dict] = {}

    def solve(self, layer: Layer, like: Tensor) -> Tensor:
        """The task vector of ``layer`` in the shape and dtype of ``like``."""
        if layer.name not in self._solved:
            self._solve_sharers(self._evidence.leaders[layer.name])
        return layer.from_matrices(self._solved.pop(layer.name), like.shape).to(like.dtype)

    def _solve_sharers(self, leader: str) -> None:
        members = self._members[leader]
        gram = self._shrink(leader, self._evidence.grams.pop(leader))
        products = [self._shrink_product(layer, self._evidence.products.pop(layer.name)) for layer in members]
        if self._ridge > 0:
            gram = gram.clone()
            diagonal = gram.diagonal(dim1=-2, dim2=-1)
            diagonal += self._ridge * diagonal.mean(-1, keepdim=True)
        solution = ops.layer_solve(gram, products, rcond=self._cut_off)
        for layer, task_vector in zip(members, solution.T, strict=True):
            self._solved[layer.name] = task_vector
            self.quality[layer.name] = {
                "features": gram.shape[-1],
                "rank": int(torch.as_tensor(solution.rank).min()),
                "condition": float(torch.as_tensor(solution.condition).max()),
            }
