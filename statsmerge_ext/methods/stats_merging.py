"""StatsMerging (arXiv 2506.04567): a learner that turns statistics of weights into merging coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.distillation import ExpertTeachers
from statsmerge_ext.engine.learning import Training, learn_coefficients
from statsmerge_ext.engine.merged_model import LayerWiseMergedModel, is_layer_wise, weighed
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.streaming import Piece
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evidence import collect_weight_statistics
from statsmerge_ext.methods.learner import FittedLearner, Normalisation, StatsMergeLearner
from statsmerge_ext.methods.registry import register_method

#: The statistics by name, as ``statistics`` chooses among them; "sigma" stands for all singular values.
STATISTICS = ("mean", "variance", "norm", "sigma")


@register_method("stats_merging", needs=("batches",))
def stats_merging(
    problem: MergeProblem,
    *,
    granularity: str = "layer",
    of: str = "weights",
    space: str = "task_vectors",
    r: int = 3,
    statistics: Sequence[str] = STATISTICS,
    shared: bool = True,
    hidden: int = 256,
    init_values: float | None = None,
    softmax: bool = False,
    loss: str = "cross_entropy",
    temperature: float = 1.0,
    epochs: int = 500,
    lr: float = 1e-3,
    lr_step: int = 100,
    autocast: bool = False,
    holdout: float = 0.0,
    patience: int = 20,
    together: int = 64,
    storage: str = "full",
) -> Solution:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l, λ_k^l = learner(statistics of layer l of expert k).

    The learner is trained by distillation: on expert k's unlabelled batches the
    expert with its own head is the teacher and the merged model with the same head the student. Only the learner
    receives gradients, and no label is ever read.

    Args:
        granularity: "layer" for a λ a layer and expert, "task" for one an expert (from model-wise statistics).
        of: take the statistics of the experts' "weights" (the paper's text) or "task_vectors" (its code).
        space: λ weighs the "task_vectors" (the paper's code) or the experts' "weights", θ^l = Σ_k λ_k^l θ_k^l (its
            text).
        r: number of singular values.
        statistics: which of "mean", "variance", "norm" and "sigma" the learner sees.
        shared: one learner for all layers (the paper's text), or one a layer (its code), which fits the models at hand
            more closely and can only be applied to others of their architecture.
        hidden: width of a learner.
        init_values: the λ to start from; None: 0.3 for task vectors and 1 / K for weights.
        softmax: pass the learner's outputs through a softmax over the experts (the paper's code); they then start
            at 1 / K, whatever ``init_values``.
        loss: "cross_entropy" against the teacher's most likely class, "kl" from its distribution, or "features" for
            embedding models without a head.
        temperature: of both distributions in "kl", whose loss is scaled by its square.
        epochs, lr, lr_step: Adam's epochs over the calibration batches, its learning rate, and after how many epochs
            that is divided by ten.
        autocast: run the merged model in bfloat16 while learning: much faster on processors that multiply bfloat16,
            with coefficients that differ a little.
        holdout, patience: the share of the batches to stop early by, and after how many epochs without progress there.
        together: most samples, of all tasks, that are run at once.
        storage: "full", "bfloat16", "int8", "int4", "int3" or "int2": in what form the task vectors wait for the next
            step; what is smaller than "full" takes that much less memory, and merges what it stores.

    Raises:
        MethodError: a setting is unknown or out of range, no expert differs from the base, or the first loss is not
            finite.
        CalibrationError: the model's outputs are not what the loss compares.
    """
    training = Training(epochs, lr, lr_step, autocast, holdout, patience, together)
    is_layer_wise(granularity)
    columns = _columns(statistics, r)
    if init_values is None:
        init_values = 0.3 if space == "task_vectors" else 1 / len(problem.experts)
    teachers = ExpertTeachers(problem, loss, temperature)
    merged = LayerWiseMergedModel(problem, space=space, storage=storage)
    collected = collect_weight_statistics(
        merged.layers, problem.base, problem.experts, of=of, r=r, progress=problem.progress
    )
    values = collected.values if granularity == "layer" else collected.model_wise()
    own = None if shared or granularity == "task" else collected.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        network = StatsMergeLearner(2 * len(columns), hidden, init_values, len(own) if own else None)
    learner = FittedLearner(network, Normalisation.of(values, columns), of, r, granularity, space, softmax, own)
    features = learner.features(collected)
    facts = learn_coefficients(
        merged,
        lambda: learner.coefficients(features),
        network.parameters(),
        teachers.output,
        teachers.loss,
        training,
        "StatsMerging",
    )
    solution = merged.merge_and_unload(learner.coefficients(features).detach())
    solution.notes["training"] = facts
    solution.learner = learner
    return solution


@register_method("stats_merging_predict")
def stats_merging_predict(problem: MergeProblem, *, learner: str | Path | FittedLearner) -> Solution:
    """The coefficients that a learner trained on other models, tasks or experts predicts from statistics alone.

    No data is needed. The coefficients of an expert depend on which experts it is merged with, since a learner sees how
    they differ.

    Args:
        learner: what ``stats_merging`` has learned: ``MergeResult.learner``, or the path of the ``learner.json`` that
            it leaves beside a merged model.

    Raises:
        MethodError: no expert differs from the base.
        CheckpointError: the file is not a learner.
    """
    fitted = learner if isinstance(learner, FittedLearner) else FittedLearner.load(learner)
    changed = {x.parameter for x in problem.layers if any(t.any() for t in problem.task_vectors(x))}
    layers = [layer for layer in problem.layers if layer.parameter in changed]
    if not layers:
        raise MethodError("experts: all of them equal the base, so there are no coefficients to predict")
    statistics = collect_weight_statistics(
        layers, problem.base, problem.experts, of=fitted.of, r=fitted.r, progress=problem.progress
    )
    with torch.no_grad():
        coefficients = fitted.coefficients(fitted.features(statistics)).expand(len(layers), -1)
    rows = dict(zip((layer.name for layer in layers), coefficients, strict=True))
    unchanged = coefficients.new_full(coefficients.shape[1:], float("nan"))

    def merge(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        if piece.layer.name not in rows:
            return base
        start, moved = weighed(fitted.space, base, task_vectors)
        return ops.weighted_merge([start], [[t] for t in moved], rows[piece.layer.name])[0]

    table = torch.stack([rows.get(layer.name, unchanged) for layer in problem.layers]).double()
    of_task_vectors = fitted.space == "task_vectors" and not table.isnan().any()
    return problem.map_elements(merge, coefficients=table, is_weighted_sum=bool(of_task_vectors))


def _columns(statistics: Sequence[str], r: int) -> list[int]:
    """The columns of the statistics [mean, variance, norm, σ_1 … σ_r] that are named."""
    unknown = [name for name in statistics if name not in STATISTICS]
    if unknown or isinstance(statistics, str) or not statistics:
        raise MethodError(f"statistics: expected some of {STATISTICS}, got {statistics!r}")
    columns = [place for place, name in enumerate(STATISTICS[:3]) if name in statistics]
    return columns + (list(range(3, 3 + r)) if "sigma" in statistics else [])
