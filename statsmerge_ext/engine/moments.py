"""Second moments of a layer's inputs and targets, and the affine map that fits one to the other."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.affine import Affine
from statsmerge_ext.evidence.observe import Geometry

# A variance below this part of the mean square is rounding of float32 features.
_RESOLUTION = torch.finfo(torch.float32).eps


@dataclass
class Moments:
    """Sums over rows (tokens, or positions of a convolution) of inputs x and targets y, in float64.

    Attributes:
        gram: Σ x xᵀ, [groups, in, in]; the lower triangles, until they are mirrored.
        product: Σ y xᵀ, [groups, out, in].
        inputs: Σ x, [groups, in].
        outputs: Σ y, [groups, out].
        count: number of rows.
    """

    gram: Tensor
    product: Tensor
    inputs: Tensor
    outputs: Tensor
    count: Tensor

    @classmethod
    def zeros_like(cls, matrices: Tensor) -> Moments:
        """No rows yet, for a layer with weights ``matrices`` [groups, out, in]."""
        groups, out, columns = matrices.shape
        shapes = ((groups, columns, columns), (groups, out, columns), (groups, columns), (groups, out), ())
        return cls(*(matrices.new_zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, other: Moments) -> None:
        """Add the rows of ``other``."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))

    def add_rows(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Add rows x [..., in] and y [..., out] of a layer of one group, with one factor a row in ``weight`` [...]."""
        x, y = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
        factors = None if weight is None else weight.reshape(1, -1).to(x)
        ops.gram_accumulate_(self.gram, x, weight=factors)
        ops.gram_accumulate_(self.product, y, other=x, weight=factors)
        ones = x.new_ones(1, 1, x.shape[1]) if factors is None else factors.unsqueeze(1)
        self.inputs += (ones @ x).squeeze(1)
        self.outputs += (ones @ y).squeeze(1)
        self.count += ones.sum()

    def add_channels(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Add rows x and y [..., channels], each channel being a group with one input and one output."""
        x, y = x.reshape(-1, len(self.inputs)), y.reshape(-1, len(self.inputs))
        ones = x.new_ones(1, len(x)) if weight is None else weight.reshape(1, -1).to(x)
        self.gram += (ones @ x.square())[0, :, None, None]
        self.product += (ones @ (x * y))[0, :, None, None]
        self.inputs += (ones @ x)[0, :, None]
        self.outputs += (ones @ y)[0, :, None]
        self.count += ones.sum()

    def add_patches(self, x: Tensor, y: Tensor, geometry: Geometry) -> None:
        """Add the patches of x [N, C, *spatial] and the outputs y [N, groups · out, *outputs] of a convolution."""
        ops.gram_accumulate_patches_(self.gram, x, **vars(geometry))
        self.product += _correlate(y, x, geometry).reshape(self.product.shape)
        ones = y.new_ones(len(y), geometry.groups, *y.shape[2:])
        self.inputs += _correlate(ones, x, geometry).reshape(self.inputs.shape)
        self.outputs += y.transpose(0, 1).flatten(1).sum(1).reshape(self.outputs.shape)
        self.count += y[:, 0].numel()

    def with_targets_of(self, map: Affine) -> Moments:
        """The same inputs, with what ``map`` makes of them as targets. The Gram matrix must be whole."""
        matrices, shift = map.matrices.double(), map.shift
        product, outputs = matrices @ self.gram, (matrices @ self.inputs.unsqueeze(-1)).squeeze(-1)
        if shift is not None:
            shift = shift.double().reshape(outputs.shape)
            product = product + shift.unsqueeze(-1) * self.inputs.unsqueeze(-2)
            outputs = outputs + shift * self.count
        return Moments(self.gram, product, self.inputs, outputs, self.count)

    def fit(self, anchor: Tensor, ridge: float, *, shifted: bool) -> tuple[Tensor, Tensor | None]:
        """argmin Σ ‖W x + b − y‖² + ridge · m · ‖W − anchor‖², m being the mean eigenvalue of x's Gram matrix.

        With ``shifted`` the shift b is free, and the Gram matrix that of x less its mean; without it, b = 0.

        Returns: W [groups, out, in] in float64, and b [groups, out] or None.
        """
        gram, product = self.gram, self.product
        least = _RESOLUTION * _mean_eigenvalue(gram)
        if shifted:
            means = self.inputs / self.count
            gram = gram - self.inputs.unsqueeze(-1) * means.unsqueeze(-2)
            product = product - self.outputs.unsqueeze(-1) * means.unsqueeze(-2)
        scale = torch.maximum(_mean_eigenvalue(gram), least)
        scale = torch.where(scale > 0, scale, 1)  # a group that saw only zeros keeps its anchor
        solution = ops.layer_solve(gram / scale, product / scale, filter="ridge", ridge=ridge, anchor=anchor.double())
        return solution.T, self.shift_of(solution.T) if shifted else None

    def shift_of(self, weight: Tensor) -> Tensor:
        """The b with which W x + b has the mean of y, [groups, out]."""
        return (self.outputs - (weight @ self.inputs.unsqueeze(-1)).squeeze(-1)) / self.count


def _mean_eigenvalue(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _correlate(y: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Σ over positions of y times x's patches, [channels of y, C / groups, *kernel]: what the gradient of a convolution
    with respect to its weight is, for the gradient y of its output."""
    dims = len(geometry.kernel_size)
    x = F.pad(x, [side for pair in reversed(geometry.padding) for side in pair])
    shape = (y.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
    return torch.ops.aten.convolution_backward(
        y,
        x,
        y.new_empty(1).expand(shape),
        None,
        list(geometry.stride),
        [0] * dims,
        list(geometry.dilation),
        False,
        [0] * dims,
        geometry.groups,
        [False, True, False],
    )[1]
