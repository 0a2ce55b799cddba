"""Sums of symmetric matrices in half their memory."""

from __future__ import annotations

from torch import Tensor

from statsmerge_ext import ops

_ROWS = 512  # of a slab: a matrix of no more rows is kept whole


class TriangleSum:
    """A sum of symmetric matrices [groups, n, n] of one shape, kept as slabs of rows up to their diagonals.

    Args:
        like: of the shape, dtype and device of the matrices.
    """

    def __init__(self, like: Tensor) -> None:
        self._shape = groups, n, _ = like.shape
        self._slabs = [
            like.new_zeros(groups, min(_ROWS, n - first), min(first + _ROWS, n)) for first in range(0, max(n, 1), _ROWS)
        ]

    def add(self, matrices: Tensor) -> None:
        """Add matrices whose lower triangles are up to date."""
        for rows, slab in zip(matrices.split(_ROWS, 1), self._slabs, strict=True):
            slab += rows[..., : slab.shape[-1]]

    def whole(self) -> Tensor:
        """The sum, [groups, n, n]; the slabs are given away."""
        if len(self._slabs) == 1:
            return ops.symmetrize_(self._slabs.pop())
        total = self._slabs[0].new_empty(self._shape)
        for rows in reversed(total.split(_ROWS, 1)):
            slab = self._slabs.pop()
            rows[..., : slab.shape[-1]] = slab
        return ops.symmetrize_(total)
