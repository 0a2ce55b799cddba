"""AdaMerging and AdaMerging++ (arXiv 2310.02575): coefficients that minimise the entropy of the merged predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from statsmerge_ext.distillation.losses import masked_mean
from statsmerge_ext.distillation.teachers import logits_of, token_mask
from statsmerge_ext.engine.learning import Training, learn_coefficients
from statsmerge_ext.engine.merged_model import LayerWiseMergedModel, is_layer_wise
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.methods.registry import register_method
from statsmerge_ext.methods.ties import Election


@register_method("adamerging", needs=("batches",))
def adamerging(
    problem: MergeProblem,
    *,
    granularity: str = "layer",
    density: float | None = None,
    init_values: float = 0.3,
    clamp_weights: bool = True,
    epochs: int = 125,
    lr: float = 1e-3,
    lr_step: int = 10_000,
    autocast: bool = False,
    holdout: float = 0.0,
    patience: int = 20,
    together: int = 64,
    storage: str = "full",
) -> Solution:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l with the λ that make the mean entropy of all tasks' predictions least.

    The batches are the unlabelled calibration samples; the paper uses the test samples themselves, which are not
    there at merging time.

    Args:
        granularity: "layer" for a λ a layer and expert, "task" for one an expert.
        density: None for AdaMerging; for AdaMerging++ the share of each task vector's entries that TIES keeps (the
            paper: 0.2), of which those against the elected sign are left out as well.
        init_values: the λ to start from.
        clamp_weights: keep λ in [0, 1].
        epochs, lr, lr_step, autocast, holdout, patience, together, storage: as in ``stats_merging``; the paper takes
            500 steps of 16 samples a task.

    Raises:
        MethodError: a granularity or setting out of range, no expert differs from the base, or a first loss not finite.
    """
    training = Training(epochs, lr, lr_step, autocast, holdout, patience, together)
    layer_wise = is_layer_wise(granularity)
    prepared = {} if density is None else {"prepare": Election(problem, density).elected}
    merged = LayerWiseMergedModel(problem, storage=storage, **prepared)
    shape = (len(merged.layers), len(problem.experts)) if layer_wise else (len(problem.experts),)
    values = torch.full(shape, init_values, requires_grad=True)

    def coefficients() -> Tensor:
        return values.clamp(0, 1) if clamp_weights else values

    def entropy(name: str, place: int, logits: Tensor) -> Tensor:
        entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        return masked_mean(entropies, token_mask(problem.batches[name][place], logits))

    def output(name: str, result: object) -> Tensor:
        return logits_of(problem.heads.get(name), result)

    facts = learn_coefficients(merged, coefficients, [values], output, entropy, training, "AdaMerging")
    solution = merged.merge_and_unload(coefficients().detach())
    solution.notes["training"] = facts
    return solution
