"""Layer-wise anchor merging (arXiv 2409.15813): early layers are averaged, later ones lean towards one model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer
from statsmerge_ext.methods.registry import nearest, register_method

RAMPS = ("linear", "cosine")


@register_method("layer_wise_anchor")
def layer_wise_anchor(
    problem: MergeProblem,
    *,
    anchor: str | None = None,
    start: float = 0.0,
    ramp: str = "linear",
    anchor_parameters: Sequence[str] = (),
) -> Solution:
    """θ^l = Σ_k λ_k^l θ_k^l with λ = 1/K for all at the input and 1 for the anchor at the output; no data is needed.

    With ρ(d) rising from 0 to 1 over the depth d of a layer, λ is (1 − ρ) / K for every expert, and ρ more for the
    anchor. The paper does not give its schedule; two ramps are offered. Depth is a layer's place among the modules of
    the model, from 0 to 1.

    Args:
        anchor: name of the expert that the later layers lean towards; None: the first.
        start: depth at which the ramp begins; all layers before it are plain averages.
        ramp: "linear" or "cosine".
        anchor_parameters: parts of parameter names, such as "decode_head"; parameters with one of them are the anchor's
            own.

    Raises:
        MethodError: an unknown anchor or ramp, a start outside [0, 1), or a part that no parameter's name holds.
    """
    names = list(problem.experts)
    anchor = names[0] if anchor is None else anchor
    if anchor not in names:
        raise MethodError(f"anchor: expected one of {names}, got {anchor!r}{nearest(anchor, names)}")
    if ramp not in RAMPS:
        raise MethodError(f"ramp: expected one of {RAMPS}, got {ramp!r}")
    if not 0 <= start < 1:
        raise MethodError(f"start: expected a depth in [0, 1), got {start}")
    for part in anchor_parameters:
        if not any(part in layer.parameter for layer in problem.layers):
            raise MethodError(f"anchor_parameters: no parameter's name holds {part!r}")
    depths = _depths(problem)
    table = torch.zeros(len(problem.layers), len(names), dtype=torch.float64)
    for row, layer in enumerate(problem.layers):
        own = any(part in layer.parameter for part in anchor_parameters)
        lean = 1.0 if own else _lean(depths[row], start, ramp)
        table[row] = (1 - lean) / len(names)
        table[row, names.index(anchor)] += lean
    rows = dict(zip((layer.name for layer in problem.layers), table, strict=True))

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        return ops.weighted_merge([base], [[t] for t in task_vectors], rows[piece.layer.name])[0]

    return problem.map_elements(merge, coefficients=table, is_weighted_sum=True)


def _depths(problem: MergeProblem) -> list[float]:
    """The place of each layer's module among all of the model, 0 for the first and 1 for the last."""
    modules = dict.fromkeys(_module(layer) for layer in problem.model_layers)
    places = {module: place for place, module in enumerate(modules)}
    return [places[_module(layer)] / max(1, len(places) - 1) for layer in problem.layers]


def _module(layer: Layer) -> str:
    return layer.parameter.rpartition(".")[0]


def _lean(depth: float, start: float, ramp: str) -> float:
    position = max(0.0, depth - start) / (1 - start)
    return position if ramp == "linear" else (1 - math.cos(math.pi * position)) / 2
