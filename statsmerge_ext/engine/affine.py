"""A layer as the affine map it is: y = W x + b, whatever its kind, with the tensors of one merge filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statsmerge_ext.evidence.observe import Geometry
from statsmerge_ext.layers import Layer

# The scale of a norm is divided by. One that is smaller than this part of the mean counts as this part.
_LEAST_SCALE = 0.02


@dataclass(frozen=True)
class Affine:
    """The map of one layer of one model.

    Attributes:
        layer: of kind "linear", "conv" or "scale".
        weight: in the parameter's own shape; of a scale, what its input is multiplied by.
        shift: [out], or None.
    """

    layer: Layer
    weight: Tensor
    shift: Tensor | None

    @property
    def matrices(self) -> Tensor:
        """The weight as [groups, out, in]; each channel of a norm is a group of its own."""
        return self.weight.reshape(-1, 1, 1) if self.layer.kind == "scale" else self.layer.matrices(self.weight)

    def with_matrices(self, matrices: Tensor, shift: Tensor | None) -> Affine:
        """The map with other ``matrices`` and ``shift`` [groups, out], in this one's shapes and dtype."""
        if self.layer.kind == "scale":
            weight = matrices.reshape(self.weight.shape)
        else:
            weight = self.layer.from_matrices(matrices, self.weight.shape)
        shift = None if shift is None else shift.flatten().to(self.weight.dtype)
        return replace(self, weight=weight.to(self.weight.dtype), shift=shift)

    def __call__(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        """The layer's output for features ``x`` as an observation has them; channels are second for a convolution, last
        for others."""
        if self.layer.kind == "scale":
            return x * self.weight if self.shift is None else torch.addcmul(self.shift, x, self.weight)
        if self.layer.kind == "linear":
            return F.linear(x, self.matrices[0], self.shift)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel_size) - 1]
        return convolve(
            padded(x, geometry), self.weight, self.shift, geometry.stride, 0, geometry.dilation, geometry.groups
        )

    def then(self, scale: Tensor, shift: Tensor) -> Affine:
        """This map followed by a factor and a summand a channel, [out] both."""
        weight = self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1))
        return replace(self, weight=weight, shift=shift if self.shift is None else self.shift * scale + shift)


def padded(x: Tensor, geometry: Geometry) -> Tensor:
    """The input x [N, C, *spatial] of a convolution with the zeros around it."""
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    return F.pad(x, sides) if any(sides) else x


def shifts_of(layers: list[Layer]) -> dict[str, Layer]:
    """Layer -> the bias that is added to its outputs, for layers that are fitted together with theirs."""
    biases = {layer.parameter: layer for layer in layers if layer.kind == "bias"}
    names = {layer.name: layer.parameter.removesuffix("weight") + "bias" for layer in layers}
    return {
        layer.name: replace(biases[names[layer.name]], rows=layer.rows)
        for layer in layers
        if layer.kind in ("linear", "conv", "scale") and names[layer.name] in biases
    }


def batch_norm_map(module: nn.Module, path: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factor and summand a channel of a BatchNorm with frozen statistics, its tensors taken from ``state``."""
    weight, bias, mean, variance = (
        state[f"{path}.{name}".removeprefix(".")].detach().to(torch.promote_types(module.weight.dtype, torch.float32))
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * (variance + module.eps).rsqrt()
    return scale, bias - scale * mean


def divisible(scale: Tensor) -> Tensor:
    """``scale`` with entries too small to divide by replaced."""
    least = _LEAST_SCALE * scale.abs().mean()
    return torch.where(scale.abs() < least, least, scale)
