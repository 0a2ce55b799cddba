"""Second moments of a layer's inputs and targets, and the affine map that fits one to the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.affine import padded
from statsmerge_ext.engine.solving import RESOLUTION
from statsmerge_ext.engine.spectral import FILTERS, effective_rank, mean_eigenvalue, spectral_solution
from statsmerge_ext.evidence.observe import Geometry


@dataclass
class Moments:
    """Sums over rows (tokens, or positions of a convolution) of inputs x and targets y.

    One expert's are in the dtype of its features, as exact as these are; those of all experts, which are solved, in
    float64.

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
    def zeros_like(cls, matrices: Tensor, dtype: torch.dtype | None = None) -> Moments:
        """No rows yet, for a layer with weights ``matrices`` [groups, out, in]; in their dtype or ``dtype``."""
        groups, out, columns = matrices.shape
        shapes = ((groups, columns, columns), (groups, out, columns), (groups, columns), (groups, out), ())
        return cls(*(matrices.new_zeros(shape, dtype=dtype) for shape in shapes))

    def add(self, other: Moments) -> None:
        """Add the rows of ``other``."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))

    def add_up_(self) -> None:
        """The rows of all processes. Raises ProcessError if one has ended."""
        for field in fields(self):
            processes.add_up_(getattr(self, field.name))

    def scaled(self, factor: float) -> Moments:
        """The same rows, each counted ``factor`` times."""
        return Moments(*(factor * getattr(self, field.name) for field in fields(self)))

    def add_rows(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Add rows x [..., in] and y [..., out] of a layer of one group, with one factor a row in ``weight`` [...]."""
        x, y = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
        factors = None if weight is None else weight.reshape(1, -1).to(x)
        ops.gram_accumulate_(self.gram, x, weight=factors)
        ops.gram_accumulate_(self.product, y, other=x, weight=factors)
        self._add_means(x, y, factors)

    def add_channels(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Add rows x and y [..., channels], each channel being a group with one input and one output."""
        x, y = (tensor.reshape(-1, len(self.inputs)).T.unsqueeze(-1) for tensor in (x, y))
        factors = None if weight is None else weight.reshape(1, -1).to(x)
        weighted = x if factors is None else x * factors.unsqueeze(-1)
        self.gram += (weighted * x).sum(1, keepdim=True)
        self.product += (weighted * y).sum(1, keepdim=True)
        self._add_means(x, y, factors)

    def add_patches(self, x: Tensor, y: Tensor, geometry: Geometry) -> None:
        """Add the patches of x [N, C, *spatial] and the outputs y [N, groups · out, *outputs] of a convolution."""
        ops.gram_accumulate_patches_(self.gram, x, **vars(geometry))
        ops.gram_accumulate_patches_(self.product.mT, x, **vars(geometry), other=y)
        by_tap = self.inputs.unflatten(-1, (-1, math.prod(geometry.kernel_size))).unbind(-1)
        for inputs, tap in zip(by_tap, _taps(_sum_of_images(x), geometry), strict=True):
            inputs += tap.flatten(1).sum(1).reshape(inputs.shape)
        self.outputs += y.sum((0, *range(2, y.dim()))).reshape(self.outputs.shape)
        self.count += y.numel() // y.shape[1]

    def _add_means(self, x: Tensor, y: Tensor, factors: Tensor | None) -> None:
        """Take account of rows x [groups, rows, in] and y [groups, rows, out] in all that is no product of the two."""
        if factors is not None:
            x, y = x * factors.unsqueeze(-1), y * factors.unsqueeze(-1)
        self.inputs += x.sum(1)
        self.outputs += y.sum(1)
        self.count += x.shape[1] if factors is None else factors.double().sum()

    def with_targets_of(self, matrices: Tensor, shift: Tensor | None) -> Moments:
        """The same inputs, with W x + b as targets: ``matrices`` W [groups, out, in] and ``shift`` b [groups · out].
        The Gram matrix must be whole."""
        return replace(self, product=self.gram, outputs=self.inputs).followed_by(matrices, shift)

    def followed_by(self, matrices: Tensor, shift: Tensor | None) -> Moments:
        """The same inputs, with W y + b as targets: ``matrices`` W [groups, new out, out] and ``shift`` b [groups · new
        out], or None."""
        shape = (*matrices.shape[:-1], self.product.shape[-1])
        product = ops.gram_accumulate_(self.product.new_zeros(shape), matrices.mT, other=self.product)
        outputs = (matrices @ self.outputs.unsqueeze(-1)).squeeze(-1)
        if shift is not None:
            shift = shift.reshape(outputs.shape)
            product += shift.unsqueeze(-1) * self.inputs.unsqueeze(-2)
            outputs += shift * self.count
        return replace(self, product=product, outputs=outputs)

    def fit(
        self, ridge: float, *, shifted: bool, anchor: Tensor | None = None, filter: str = "ridge"
    ) -> tuple[Tensor, Tensor | None]:
        """argmin Σ ‖W x + b − y‖² + ridge · m · ‖W − anchor‖², m being the mean eigenvalue of x's Gram matrix, and the
        anchor 0 if none is given; or what another of :data:`~statsmerge_ext.engine.spectral.FILTERS` of the eigenvalues
        over m makes of the same equations.

        With ``shifted`` the shift b is free, and the Gram matrix that of x less its mean; without it, b = 0.

        Returns: W [groups, out, in] in float64, and b [groups, out] or None.
        """
        gram, product, scale = self._equations(shifted)
        if filter == "ridge" and len(gram) == 1:  # the ridge is scaled rather than matrices that may be large
            weight = ops.layer_solve(gram, product, filter="ridge", ridge=ridge * float(scale), anchor=anchor).T
        elif filter == "ridge":
            weight = ops.layer_solve(gram / scale, product / scale, filter="ridge", ridge=ridge, anchor=anchor).T
        else:
            start = torch.zeros_like(product) if anchor is None else anchor
            # What is below the resolution of the features is rounding, whatever it is divided by.
            least = RESOLUTION * (mean_eigenvalue(self.gram) / scale).squeeze(-1)

            def response(values: Tensor) -> Tensor:
                return FILTERS[filter](torch.where(values > least, values, 0), ridge, float(self.count.max()))

            weight = spectral_solution(gram / scale, product / scale, start, response)
        return weight, self.shift_of(weight) if shifted else None

    def effective_rank(self, *, shifted: bool) -> float:
        """The mean over groups of the effective rank of what :meth:`fit` solves, as a part of its size."""
        values = torch.linalg.eigvalsh(self._equations(shifted)[0]).clamp_min(0)
        return float(effective_rank(values).mean()) / values.shape[-1]

    def _equations(self, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``gram`` and ``product``, centred if ``shifted``, and the mean eigenvalue that they are measured by."""
        gram, product = self._centred() if shifted else (self.gram, self.product)
        scale = torch.maximum(mean_eigenvalue(gram), RESOLUTION * mean_eigenvalue(self.gram))
        return gram, product, torch.where(scale > 0, scale, 1)  # a group that saw only zeros keeps its anchor

    def gains(self, weight: Tensor, ridge: float) -> Tensor:
        """argmin for each output of Σ (g (W x) + b − y)² with b free and a ridge that holds on to g = 1, a part of the
        variance of W x: [groups, out]."""
        means = (weight @ self.inputs.unsqueeze(-1)).squeeze(-1)
        squares = ((weight @ self.gram) * weight).sum(-1)
        variance = squares - means.square() / self.count
        covariance = (weight * self.product).sum(-1) - means * self.outputs / self.count
        usable = variance > RESOLUTION * squares
        return torch.where(usable, (covariance / variance + ridge) / (1 + ridge), 1)

    def shift_of(self, weight: Tensor) -> Tensor:
        """The b with which W x + b has the mean of y, [groups, out]."""
        return (self.outputs - (weight @ self.inputs.unsqueeze(-1)).squeeze(-1)) / self.count

    def _centred(self) -> tuple[Tensor, Tensor]:
        """``gram`` and ``product`` of inputs less their mean."""
        means = (self.inputs / self.count).unsqueeze(-2)
        return tuple(
            sums.baddbmm(of.unsqueeze(-1), means, alpha=-1)
            for sums, of in ((self.gram, self.inputs), (self.product, self.outputs))
        )


def _sum_of_images(x: Tensor) -> Tensor:
    """x [N, C, *spatial] summed over N, in the order of its memory: torch's own sum of channels last is slow."""
    order = sorted(range(1, x.dim()), key=x.stride, reverse=True)
    return x.permute(0, *order).sum(0).permute(*(order.index(dim) for dim in range(1, x.dim())))


def _taps(x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """For every element of the kernel, what it meets of x [C, *spatial] at all positions: [C, *outputs]."""
    outputs, x = geometry.outputs(x.shape[1:]), padded(x, geometry)
    for offsets in itertools.product(*map(range, geometry.kernel_size)):
        starts = [offset * spread for offset, spread in zip(offsets, geometry.dilation, strict=True)]
        spans = zip(starts, outputs, geometry.stride, strict=True)
        yield x[(..., *(slice(start, start + (count - 1) * step + 1, step) for start, count, step in spans))]
