"""FeatCal (arXiv 2605.13030): layers in execution order, held to a scaled sum of the task vectors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.engine.layer_evidence import ExpertEvidence, LayerEvidence
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.sequential import merge_in_execution_order
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.registry import register_method


@register_method("featcal", needs=("batches",), in_order=True)
def featcal(
    problem: MergeProblem, *, ridge: float = 0.05, feature_mix: float = 0.25, anchor_scale: float = 0.66
) -> Solution:
    """W = (Σ s_k W_k X̄_kᵀ X̃_k + r A)(Σ s_k X̃_kᵀ X̃_k + r I)⁻¹ for linear layers and convolutions in execution order.
    X̃_k are the inputs in the model merged so far, X̄_k = α X_k + (1 − α) X̃_k those mixed with the expert's own, s_k one
    over the Frobenius norm of X̃_kᵀ X̃_k, and A = W_0 + ρ Σ τ_k the anchor. Biases are the mean residual, weighted and
    held to their anchor likewise. The scale and shift of a norm are fitted together, with rows of equal weight, to what
    the experts' make of the merged model's rows.

    The paper's anchor is ρ' W_m + (1 − ρ') W_0, ρ' = 2.2, for a merged model W_m; task arithmetic with 0.3 makes 0.66
    of it. All tokens have the same weight here.

    Args:
        ridge: r, absolute.
        feature_mix: α; 0 for no drift to be compensated.
        anchor_scale: ρ.

    Raises:
        MethodError: a ridge that is not above 0, or a mix outside [0, 1].
    """
    if not 0 < ridge < float("inf"):
        raise MethodError(f"ridge: expected a number above 0, got {ridge}")
    if not 0 <= feature_mix <= 1:
        raise MethodError(f"feature_mix: expected a number in [0, 1], got {feature_mix}")

    def fit(evidence: LayerEvidence) -> tuple[Tensor, Tensor | None]:
        base, is_scale = evidence.base, evidence.layer.kind == "scale"
        total = Moments.zeros_like(base.matrices, torch.float64)
        total.count = torch.zeros_like(total.outputs)  # of each group: they are weighted differently
        anchor = base.matrices.double()
        held = None if base.shift is None else base.shift.double().reshape(total.outputs.shape)
        for expert in evidence.experts:
            total.add(_weighted(expert, 0.0 if is_scale else feature_mix, is_scale))
            anchor = anchor + anchor_scale * (expert.map.matrices - base.matrices)
            if held is not None:
                held = held + anchor_scale * (expert.map.shift - base.shift).reshape(held.shape)
        if is_scale and held is not None:
            matrix = torch.stack([total.gram.flatten(), total.inputs.flatten(), total.count.flatten()])
            energy, mean, count = matrix[0] + ridge, matrix[1], matrix[2] + ridge
            first = (total.product + ridge * anchor).flatten()
            second = (total.outputs + ridge * held).flatten()
            scale = (count * first - mean * second) / (energy * count - mean.square())
            shift = (second - mean * scale) / count
            return scale.reshape(anchor.shape), shift.reshape(held.shape)
        weight = ops.layer_solve(total.gram, total.product, filter="ridge", ridge=ridge, anchor=anchor).T
        if held is None:
            return weight, None
        residual = total.outputs - (weight @ total.inputs.unsqueeze(-1)).squeeze(-1)
        return weight, (residual + ridge * held) / (total.count + ridge)

    return merge_in_execution_order(problem, fit, surroundings=False)


def _weighted(expert: ExpertEvidence, feature_mix: float, is_scale: bool) -> Moments:
    """An expert's sums for mixed inputs, weighted; of a weight's product the bias is no part."""
    moments, shift = expert.moments, expert.map.shift
    on_merged = moments.with_targets_of(expert.map.matrices, shift)
    product = feature_mix * moments.product + (1 - feature_mix) * on_merged.product
    outputs = feature_mix * moments.outputs + (1 - feature_mix) * on_merged.outputs
    if is_scale:
        size = (1 / moments.count).expand(len(product))
    else:
        norm = moments.gram.flatten(1).norm(dim=-1)
        size = torch.where(norm > 0, 1 / norm, 0)
        if shift is not None:
            product = product - shift.reshape(*outputs.shape, 1) * moments.inputs.unsqueeze(-2)
    row, matrix = size[:, None], size[:, None, None]
    return replace(
        moments,
        gram=matrix * moments.gram,
        product=matrix * product,
        inputs=row * moments.inputs,
        outputs=row * outputs,
        count=row * moments.count.expand(outputs.shape),
    )
