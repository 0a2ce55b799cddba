"""What a method that solves layers in execution order is told of one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from statsmerge_ext.engine.affine import Affine
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.layers import Layer


@dataclass(frozen=True)
class ExpertEvidence:
    """What one expert says of a layer.

    Attributes:
        map: the expert's own layer; with the BatchNorm after it where there is one, less the merged model's. Where the
            layer's bias is another method's, it is less that of the merged model.
        moments: of the merged model's inputs, and of what the merged layer should make of them: what the expert's
            layer makes of the expert's inputs, plus what the residual connection around it lacks by now.
    """

    map: Affine
    moments: Moments


@dataclass(frozen=True)
class LayerEvidence:
    """A layer that is to be solved; of one with very many outputs, some of these.

    Attributes:
        layer: of kind "linear", "conv" or "scale".
        base: the base's layer.
        shifted: the shift is to be fitted too. It is the layer's bias, or that of the BatchNorm after it; not one that
            is another method's.
        normed: there is a BatchNorm after it, whose factors are those of the experts' mean.
        experts: gives the experts' evidence one by one, once; each is computed when it is asked for.
    """

    layer: Layer
    base: Affine
    shifted: bool
    normed: bool
    experts: Iterator[ExpertEvidence]


#: Gives a layer's matrices [groups, out, in] and its shift [groups, out], None unless it is shifted; or None for both,
#: to leave the layer at the experts' mean.
Fit = Callable[[LayerEvidence], tuple[Tensor, Tensor | None] | None]
