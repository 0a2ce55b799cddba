"""StatsMerging (arXiv 2506.04567): a learner that turns statistics of weights into merging coefficients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statsmerge_ext.engine.merged_model import LayerWiseMergedModel, is_layer_wise, learn_coefficients, logits_of
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evidence import collect_weight_statistics
from statsmerge_ext.methods.registry import register_method

LOSSES = ("cross_entropy", "kl")


class StatsMergeLearner(nn.Module):
    """Two-layer perceptron from features of statistics [..., F] to coefficients [...].

    Its last layer starts small, so that every coefficient starts near ``init_values``.
    """

    def __init__(self, features: int, hidden: int = 256, init_values: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        nn.init.normal_(self.layers[2].weight, std=1e-3 / hidden**0.5)
        nn.init.constant_(self.layers[2].bias, init_values)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(-1)


def statistics_features(values: Tensor) -> Tensor:
    """Statistics [..., K, 3 + r] (mean, variance, norm, singular values) as features [..., K, 2 (3 + r)] float32.

    All but the mean are positive and spread over decades, so their logarithm is taken. Each is then standardised
    twice: over all layers and experts, which tells layers apart, and over the experts of its own layer, which tells
    experts apart whose weights hardly differ.
    """
    values = values.double()
    floor = values[..., 1:].abs().amax().clamp_min(1e-30) * 1e-12
    values = torch.cat([values[..., :1], values[..., 1:].clamp_min(floor).log()], -1)

    def standardise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        centred = x - x.mean(dims, keepdim=True)
        spread = centred.square().mean(dims, keepdim=True).sqrt()
        return torch.where(spread > 1e-12, centred / spread.clamp_min(1e-12), 0)

    everywhere = standardise(values, tuple(range(values.dim() - 1)))
    within_layer = standardise(values, (-2,))
    return torch.cat([everywhere, within_layer], -1).float()


@register_method("stats_merging", needs=("batches",))
def stats_merging(
    problem: MergeProblem,
    *,
    granularity: str = "layer",
    of: str = "weights",
    r: int = 3,
    hidden: int = 256,
    init_values: float = 0.3,
    softmax: bool = False,
    loss: str = "cross_entropy",
    temperature: float = 1.0,
    epochs: int = 500,
    lr: float = 1e-3,
    lr_step: int = 100,
    autocast: bool = False,
) -> Solution:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l, λ_k^l = learner(statistics of layer l of expert k).

    One learner is shared by all layers and experts. It is trained by distillation: on expert k's unlabelled batches the
    expert with its own head is the teacher and the merged model with the same head the student. Only the learner
    receives gradients, and no label is ever read.

    Args:
        granularity: "layer" for a λ a layer and expert, "task" for one an expert (from model-wise statistics).
        of: take the statistics of the experts' "weights" (the paper's text) or "task_vectors" (its code).
        r: number of singular values.
        hidden: width of the learner.
        init_values: the λ to start from.
        softmax: pass the learner's outputs through a softmax over the experts (the paper's code); they then start
            at 1 / K, whatever ``init_values``.
        loss: "cross_entropy" against the teacher's most likely class, or "kl" from its distribution.
        temperature: of both distributions in "kl", whose loss is scaled by its square.
        epochs, lr, lr_step: Adam's epochs over the calibration batches, its learning rate, and after how many epochs
            that is divided by ten.
        autocast: run the merged model in bfloat16 while learning (:func:`learn_coefficients`): much faster on
            processors that multiply bfloat16, with coefficients that differ a little.

    Raises:
        MethodError: a setting is unknown or out of range, no expert differs from the base, or the loss diverges.
        CalibrationError: the model's outputs are no logits and there are no heads.
    """
    if loss not in LOSSES:
        raise MethodError(f"loss: expected one of {LOSSES}, got {loss!r}")
    layer_wise = is_layer_wise(granularity)
    teachers = teacher_logits(problem)
    merged = LayerWiseMergedModel(problem)
    statistics = collect_weight_statistics(
        merged.layers, problem.base, problem.experts, of=of, r=r, progress=problem.progress
    )
    features = statistics_features(statistics.values if layer_wise else statistics.model_wise())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        learner = StatsMergeLearner(features.shape[-1], hidden, init_values)

    def coefficients() -> Tensor:
        outputs = learner(features)
        return outputs.softmax(-1) if softmax else outputs

    def distillation(name: str, place: int, logits: Tensor) -> Tensor:
        teacher = teachers[name][place]
        if loss == "cross_entropy":
            return F.cross_entropy(logits, teacher.argmax(-1))
        student = (logits / temperature).log_softmax(-1)
        return temperature**2 * F.kl_div(student, (teacher / temperature).softmax(-1), reduction="batchmean")

    facts = learn_coefficients(
        merged,
        coefficients,
        learner.parameters(),
        distillation,
        epochs=epochs,
        lr=lr,
        lr_step=lr_step,
        autocast=autocast,
        description="StatsMerging",
    )
    solution = merged.merge_and_unload(coefficients().detach())
    solution.notes["training"] = facts
    return solution


def teacher_logits(problem: MergeProblem) -> dict[str, list[Tensor]]:
    """Each expert's logits on its own unlabelled batches, [N, C] a batch."""
    logits = {}
    with torch.no_grad():
        for name, state in problem.experts.items():
            problem.model.load_state_dict(dict(state), strict=False)
            problem.model.eval()
            head = problem.heads.get(name)
            logits[name] = [logits_of(head, problem.forward(problem.model, b)) for b in problem.batches[name]]
    return logits
