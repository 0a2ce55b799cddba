"""Drift compensation: layers solved in execution order against what the merged model itself feeds them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from statsmerge_ext.engine.layer_evidence import LayerEvidence
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.sequential import merge_in_execution_order
from statsmerge_ext.engine.spectral import FILTERS
from statsmerge_ext.errors import MethodError
from statsmerge_ext.methods.registry import nearest, register_method

ANCHORS = ("base", "mean", "sum")
WEIGHTINGS = ("equal", "gram", "energy")
RIDGES_BY = ("eigenvalue", "effective_rank", "rows")
# Rows for each of its inputs with which a layer takes the ridge as it is given.
_ROWS_AN_INPUT = 20


@register_method("drift_compensation", needs=("batches",), in_order=True)
def drift_compensation(
    problem: MergeProblem,
    *,
    scaling_factor: float = 1.3,
    ridge: float = 0.1,
    drift_ridge: float | None = None,
    ridge_by: str = "eigenvalue",
    filter: str = "ridge",
    anchor: str = "sum",
    anchor_scale: float = 3.0,
    weighting: str = "equal",
    feature_mix: float = 0.0,
) -> Solution:
    """W = W_0 + λ (W* − W_0) with, for each layer in execution order, the W* that takes the merged model's own inputs
    X̃_k nearest to the experts' outputs: min Σ_k ‖X̃_k W*ᵀ − X_k W_kᵀ‖².

    It is solved in two steps that share C = Σ X̃_kᵀ X̃_k, since the targets have two parts. What W_k makes of X̃_k is an
    exact linear function of it: A = (Σ W_k X̃_kᵀ X̃_k + r A_0)(C + r I)⁻¹, where the anchor A_0 decides about directions
    that the samples show little of. What is left, above all the drift X_k − X̃_k from layers before, is mostly no such
    function and would be fitted by chance with few samples. Its ridge holds on to A:
    W* = A + (Σ W_k X_kᵀ X̃_k − A C)(C + r' I)⁻¹. docs/drift_compensation.md derives all this, says what becomes of
    biases, norms and residual connections, and has what each choice gave.

    Args:
        scaling_factor: λ of linear layers and convolutions. Their mean outputs, where there is a shift, do not depend
            on it, nor do the scales of norms.
        ridge: r as a part of the mean eigenvalue of C. With 1 in its place merged classifiers have been better still,
            and language models worse.
        drift_ridge: r', likewise; None: r.
        ridge_by: what r' is the same part of in all layers: the mean "eigenvalue"; that times the square root of the
            "effective_rank" of C over its size; or of the layer's inputs over its "rows", where both ridges change and
            20 rows an input leave them as they are.
        filter: what solves for W*: the "ridge", or one of the spectral filters of C's eigenvalues over their mean:
            "rank" (those above r' are solved and no others), "effective_rank" and "gavish_donoho" (as many as these
            say), "exponential" (gradient descent for the time 1 / r').
        anchor: A_0, what A is held to by its ridge, and what becomes of inputs that no sample shows: the "base", the
            "mean" of the experts, or W_0 plus the scaled "sum" of the task vectors, times λ in the end.
        anchor_scale: of that sum.
        weighting: of tasks: "equal" (each row counts the same), one over the Frobenius norm of X̃_kᵀ X̃_k ("gram") or
            over its trace ("energy").
        feature_mix: α, for X̃_k + α (X_k − X̃_k) in the place of X̃_k; 1 for the experts' own inputs.

    Raises:
        MethodError: a ridge that is not above 0, a mix outside [0, 1], or a choice that there is not.
    """
    drift_ridge = ridge if drift_ridge is None else drift_ridge
    for name, value in (("ridge", ridge), ("drift_ridge", drift_ridge)):
        if not 0 < value < float("inf"):
            raise MethodError(f"{name}: expected a number above 0, got {value}")
    if not 0 <= feature_mix <= 1:
        raise MethodError(f"feature_mix: expected a number in [0, 1], got {feature_mix}")
    _check("ridge_by", ridge_by, RIDGES_BY)
    _check("filter", filter, ("ridge", *FILTERS))
    _check("anchor", anchor, ANCHORS)
    _check("weighting", weighting, WEIGHTINGS)

    share = {"base": 0.0, "mean": 1 / len(problem.experts), "sum": anchor_scale}[anchor]

    def fit(evidence: LayerEvidence) -> tuple[Tensor, Tensor | None]:
        base, shifted = evidence.base.matrices, evidence.shifted
        total = Moments.zeros_like(base, torch.float64)
        product, outputs = torch.zeros_like(total.product), torch.zeros_like(total.outputs)
        held, rows = torch.zeros_like(total.product), 0.0
        for expert in evidence.experts:
            task_vector = expert.map.matrices - base
            moments = expert.moments if weighting == "equal" else _weighted(expert.moments, weighting)
            rows += float(expert.moments.count)
            total.add(moments)
            agreeing = moments.with_targets_of(task_vector, expert.map.shift)
            product += agreeing.product
            outputs += agreeing.outputs
            held += share * task_vector
        if weighting != "equal" and rows:  # the mean weight is 1
            size = rows / float(total.count)
            total, product, outputs = total.scaled(size), size * product, size * outputs
        factor = _ridge_factor(ridge_by, total, shifted)
        of_agreement = factor if ridge_by == "rows" else 1
        agreement = replace(total, product=product, outputs=outputs)
        moved, _ = agreement.fit(of_agreement * ridge, shifted=shifted, anchor=held)
        matrices, shift = total.fit(factor * drift_ridge, shifted=shifted, anchor=base + moved, filter=filter)
        if evidence.layer.kind != "scale":
            matrices = base + scaling_factor * (matrices - base)
            if evidence.normed:
                matrices = matrices * total.gains(matrices, drift_ridge).unsqueeze(-1)
            shift = total.shift_of(matrices) if shifted else None
        return matrices, shift

    return merge_in_execution_order(problem, fit, feature_mix=feature_mix)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise MethodError(f"{name}: expected one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")


def _weighted(moments: Moments, weighting: str) -> Moments:
    """One expert's sums, over their size."""
    gram = moments.gram
    size = float(gram.norm() if weighting == "gram" else gram.diagonal(dim1=-2, dim2=-1).sum())
    return moments.scaled(1 / size) if size > 0 else moments


def _ridge_factor(ridge_by: str, total: Moments, shifted: bool) -> float:
    if ridge_by == "effective_rank":
        return total.effective_rank(shifted=shifted) ** 0.5
    if ridge_by == "rows":
        return (_ROWS_AN_INPUT * total.gram.shape[-1] / max(1.0, float(total.count))) ** 0.5
    return 1.0
