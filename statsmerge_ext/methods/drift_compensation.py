"""Drift compensation: layers solved in execution order against what the merged model itself feeds them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.sequential import LayerEvidence, merge_in_execution_order
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.registry import register_method


@register_method("drift_compensation", needs=("batches",))
def drift_compensation(
    problem: MergeProblem, *, scaling_factor: float = 1.3, ridge: float = 3e-3, drift_ridge: float = 5e-2
) -> Solution:
    """W = W_0 + λ (W* − W_0) with, for each layer in execution order, the W* that takes the merged model's own inputs
    X̃_k nearest to the experts' outputs: min Σ_k ‖X̃_k W*ᵀ − X_k W_kᵀ‖².

    It is solved in two steps that share C = Σ X̃_kᵀ X̃_k, since the targets have two parts. What W_k makes of X̃_k is an
    exact linear function of it and takes a small ridge: A = (Σ W_k X̃_kᵀ X̃_k)(C + r I)⁻¹. What is left, above all the
    drift X_k − X̃_k from layers before, is mostly none and would be fitted by chance with few samples. It takes a larger
    ridge, which holds on to A: W* = A + (Σ W_k X_kᵀ X̃_k − A C)(C + r' I)⁻¹. docs/drift_compensation.md derives all
    this, and says what becomes of biases, norms and residual connections.

    Args:
        scaling_factor: λ of linear layers and convolutions. Their mean outputs, where there is a shift, do not depend
            on it, nor do the scales of norms.
        ridge: r as a part of the mean eigenvalue of C.
        drift_ridge: r', likewise.

    Raises:
        MethodError: a ridge that is not above 0.
    """
    for name, value in (("ridge", ridge), ("drift_ridge", drift_ridge)):
        if not 0 < value < float("inf"):
            raise MethodError(f"{name}: expected a number above 0, got {value}")

    def fit(evidence: LayerEvidence) -> tuple[Tensor, Tensor | None]:
        base, shifted = evidence.base.matrices, evidence.shifted
        total = Moments.zeros_like(base, torch.float64)
        product, outputs = torch.zeros_like(total.product), torch.zeros_like(total.outputs)
        for expert in evidence.experts:
            total.add(expert.moments)
            agreeing = expert.moments.with_targets_of(expert.map.matrices - base, expert.map.shift)
            product += agreeing.product
            outputs += agreeing.outputs
        moved, _ = replace(total, product=product, outputs=outputs).fit(ridge, shifted=shifted)
        matrices, shift = total.fit(drift_ridge, shifted=shifted, anchor=base + moved)
        if evidence.layer.kind != "scale":
            matrices = base + scaling_factor * (matrices - base)
            if evidence.normed:
                matrices = matrices * total.gains(matrices, drift_ridge).unsqueeze(-1)
            shift = total.shift_of(matrices) if shifted else None
        return matrices, shift

    return merge_in_execution_order(problem, fit)
