"""Accuracy of a model on a suite's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext.evaluation.suites import Suite
from statsmerge_ext.evaluation.suites.definition import Batch


def evaluate_model(
    model: nn.Module, suite: Suite, split: str = "test", progress: bool = False, **options
) -> dict[str, float]:
    """Accuracy of ``model`` with each task's own head, for every task of ``suite``.

    Args:
        model: a model that ``suite.forward`` can run; put in eval mode for the while.
        suite: a prepared suite.
        split: "validation" or "test".
        progress: show a progress bar over the tasks.
        options: of :func:`evaluate_task`.
    """
    names = tqdm(suite.task_names, desc=f"Evaluating {suite.name}", unit="task", disable=not progress, leave=False)
    return {name: evaluate_task(model, suite, name, split, **options) for name in names}


def evaluate_task(
    model: nn.Module,
    suite: Suite,
    name: str,
    split: str = "test",
    *,
    change: Callable[[np.ndarray], np.ndarray] = lambda inputs: inputs,
    limit: int | None = None,
) -> float:
    """Accuracy of ``model`` on one task of ``suite``, in [0, 1].

    ``change`` is made to raw inputs, such as images, before they are encoded; no batch begins after ``limit`` examples.
    """
    task = suite.task(name)
    training = model.training
    model.eval()
    accuracy = share_right(
        lambda batch: task.head(suite.forward(model, batch)).argmax(-1), task.batches(split, change=change), limit
    )
    model.train(training)
    return accuracy


def share_right(
    predict: Callable[[Batch], Tensor], batches: Iterable[tuple[Batch, Tensor]], limit: int | None = None
) -> float:
    """The share of labels [N] that ``predict`` gives; no batch begins after ``limit`` examples."""
    right = total = 0
    with torch.inference_mode():
        for batch, labels in batches:
            if limit is not None and total >= limit:
                break
            right += int((predict(batch) == labels).sum())
            total += len(labels)
    return right / total


def evaluate_experts(suite: Suite, split: str = "test", progress: bool = False) -> dict[str, float]:
    """Accuracy of each task's expert on its own task."""
    model = suite.load_base()
    accuracies = {}
    for name in tqdm(suite.task_names, desc=f"Experts of {suite.name}", unit="task", disable=not progress, leave=False):
        model.load_state_dict(suite.load_expert(name))
        accuracies[name] = evaluate_task(model, suite, name, split)
    return accuracies
