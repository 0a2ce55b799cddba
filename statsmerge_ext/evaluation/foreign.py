"""Experts of another architecture: teachers of a suite's tasks, and their students of the suite's own architecture.

A teacher is the expert of the suite that the base was distilled from, or a small residual network that is trained from
scratch. A student is distilled from its teacher by the recipe that the native experts were trained by, on the same
images without their labels, and can be merged in a native expert's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statsmerge_ext.distillation.student import StudentTraining, distill
from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.run import share_right
from statsmerge_ext.evaluation.suites import Suite, get_suite

SUITE, RESNET = "suite", "resnet"
#: Times that every image is shown to a teacher, each time moved differently.
VIEWS = 2


@dataclass(frozen=True)
class Teacher:
    """A classifier of one task.

    Attributes:
        model: of any architecture, in eval mode.
        logits: (model, batch) -> [N, C].
        classes: names of the classes in the order of the logits.
    """

    model: nn.Module
    logits: Callable[[nn.Module, Tensor], Tensor]
    classes: tuple[str, ...]


def make_teacher(kind: str, suite: Suite, name: str, seed: int = 0) -> Teacher:
    """The teacher of one task of a prepared suite.

    Args:
        kind: SUITE, the expert of the suite that ``suite`` was distilled from; or RESNET, trained here on the task's
            labelled training images, which takes about a minute.
        suite, name: the task.
        seed: of the residual network's initial weights and training.

    Raises:
        DataError: the suite was not distilled from another.
    """
    if kind == RESNET:
        return _train_residual_network(suite, name, seed)
    origin = suite.definition.distilled_from
    if origin is None:
        raise DataError(f"suite {suite.name}: was not distilled from another suite, whose experts could be teachers")
    other = get_suite(origin)
    other.prepare(progress=False)
    model, task = other.load_base(), other.task(name)
    model.load_state_dict(other.load_expert(name))
    return Teacher(model, lambda model, batch: task.head(other.forward(model, batch)), task.classes)


def make_student(teacher: Teacher, suite: Suite, name: str, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """Distil a teacher into the suite's base through the task's own head.

    Returns:
        the student's state dict, to be merged like an expert, and the facts of :func:`~.distillation.student.distill`.
    """
    settings, task = suite.definition.training, suite.task(name)
    generator = torch.Generator().manual_seed(seed)
    augment = settings.augment or (lambda batch, generator: batch)
    ((images, _),) = task.batches("train", batch_size=10**9)
    orders = (torch.randperm(len(images), generator=generator) for _ in range(VIEWS))
    batches = [augment(images[rows], generator) for order in orders for rows in order.split(settings.batch_size)]
    student, facts = distill(
        teacher.model,
        suite.load_base(),
        batches,
        training=StudentTraining(
            epochs=max(1, settings.epochs // VIEWS),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            autocast=settings.bfloat16,
        ),
        teacher_classes=teacher.classes,
        student_classes=task.classes,
        teacher_forward=teacher.logits,
        student_forward=lambda model, batch: task.head(suite.forward(model, batch)),
        seed=seed,
    )
    return student.state_dict(), facts


def teacher_accuracy(teacher: Teacher, suite: Suite, name: str, limit: int | None = None) -> float:
    """Test accuracy of a teacher on its task; no batch begins after ``limit`` examples."""
    task = suite.task(name)
    places = torch.tensor([task.classes.index(label) for label in teacher.classes])
    return share_right(
        lambda batch: places[teacher.logits(teacher.model, batch).argmax(-1)], task.batches("test"), limit
    )


class ResidualNetwork(nn.Module):
    """Images [N, channels, h, w] -> logits [N, C]: three residual blocks that halve the sides."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (24, 48, 96)) -> None:
        super().__init__()
        self.stem = _normalised(channels, widths[0], 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(_normalised(before, width, 2), nn.ReLU(), _normalised(width, width, 1))
            for before, width in zip(widths[:1] + widths, widths)
        )
        self.shortcuts = nn.ModuleList(
            nn.Conv2d(before, width, 1, stride=2, bias=False) for before, width in zip(widths[:1] + widths, widths)
        )
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = (block(x) + shortcut(x)).relu()
        return self.classifier(x.mean((2, 3)))


def _normalised(before: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))


def _train_residual_network(suite: Suite, name: str, seed: int, epochs: int = 10, lr: float = 3e-3) -> Teacher:
    """From random weights, on the task's labels; its classes are in alphabetical order, unlike the task's own."""
    settings, task = suite.definition.training, suite.task(name)
    classes = tuple(sorted(task.classes))
    order = torch.tensor([classes.index(label) for label in task.classes])
    generator = torch.Generator().manual_seed(seed)
    ((images, labels),) = task.batches("train", batch_size=10**9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualNetwork(images.shape[1], len(classes)).train()
    batches = len(labels) // settings.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(settings.batch_size)[:batches]:
            batch = settings.augment(images[rows], generator) if settings.augment else images[rows]
            loss = F.cross_entropy(model(batch), order[labels[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Teacher(model.eval().requires_grad_(False), lambda model, batch: model(batch), classes)
