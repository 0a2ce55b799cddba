"""The ceiling of learned coefficients: free ones, trained with true labels. For measuring, not for merging."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from statsmerge_ext.distillation.teachers import logits_of
from statsmerge_ext.engine.learning import Training, learn_coefficients
from statsmerge_ext.engine.merged_model import LayerWiseMergedModel, is_layer_wise
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.methods import Method


def labelled_coefficients(labels: Mapping[str, list[Tensor]]) -> Method:
    """A method that learns one coefficient a layer (or model) and expert from ``labels``: expert -> one tensor a batch.

    It is not registered: no merge that a user asks for reads labels.
    """

    def method(
        problem: MergeProblem,
        *,
        granularity: str = "layer",
        init_values: float = 0.3,
        epochs: int = 100,
        lr: float = 1e-3,
        lr_step: int = 100,
        autocast: bool = False,
    ) -> Solution:
        layer_wise = is_layer_wise(granularity)
        merged = LayerWiseMergedModel(problem)
        shape = (len(merged.layers), len(problem.experts)) if layer_wise else (len(problem.experts),)
        values = torch.full(shape, init_values, requires_grad=True)
        facts = learn_coefficients(
            merged,
            lambda: values,
            [values],
            lambda name, output: logits_of(problem.heads.get(name), output),
            lambda name, place, logits: F.cross_entropy(logits, labels[name][place]),
            Training(epochs, lr, lr_step, autocast),
            "Labelled coefficients",
        )
        solution = merged.merge_and_unload(values.detach())
        solution.notes["training"] = facts
        return solution

    return Method.of("labelled_coefficients", method, needs=("batches",))
