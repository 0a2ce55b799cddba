"""The loop that learns merging coefficients through a merged model, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.engine.merged_model import LayerWiseMergedModel
from statsmerge_ext.engine.together import groups, join, samples, take_apart
from statsmerge_ext.errors import MethodError


@dataclass(frozen=True)
class Training:
    """How coefficients are learned: Adam, one batch of every task a step.

    Attributes:
        epochs: passes over the task with the most batches; the others repeat theirs.
        lr: learning rate, divided by ten every ``lr_step`` epochs.
        autocast: run the model and its head in bfloat16 where torch.autocast does; merged weights, losses and
            coefficients stay as they are.
        holdout: share of every task's batches that is kept out of training, to stop early by.
        together: most samples that are run at once, whatever their task; a task's batch is never cut. More is faster,
            up to a point, and takes memory for the activations.
        patience: epochs without a smaller loss on the held-out batches after which training stops; the coefficients
            of the best epoch are taken.
    """

    epochs: int
    lr: float
    lr_step: int
    autocast: bool = False
    holdout: float = 0.0
    patience: int = 20
    together: int = 64

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.lr > 0 or self.lr_step < 1:
            got = f"{self.epochs}, {self.lr}, {self.lr_step}"
            raise MethodError(f"epochs, lr, lr_step: expected positive numbers, got {got}")
        if not 0 <= self.holdout < 1 or self.patience < 1:
            got = f"{self.holdout}, {self.patience}"
            raise MethodError(f"holdout, patience: expected a share in [0, 1) and a positive number, got {got}")
        if self.together < 1:
            raise MethodError(f"together: expected a positive number, got {self.together}")


def learn_coefficients(
    merged: LayerWiseMergedModel,
    coefficients: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    output: Callable[[str, object], Tensor],
    loss: Callable[[str, int, Tensor], Tensor],
    training: Training,
    description: str,
) -> dict:
    """Minimise ``loss`` over ``parameters``, which end at their best.

    Where a loss is not finite, learning stops and the last parameters with a finite one are kept. With a journal in the
    problem, an interrupted run is taken up at the epoch where it was, and ends with the same coefficients.

    Args:
        merged: the model to train through.
        coefficients: gives the λ [L, K] or [K] as a function of ``parameters``.
        parameters: what is learned.
        output: (expert, output of the model) -> what the loss takes, such as logits.
        loss: (expert, number of its batch, that) -> scalar; it has no labels to see.
        training: how.
        description: for the progress bar and messages.

    Returns:
        facts for the report: steps, first and last epoch's mean loss, and where they apply "best_epoch",
        "held_out_loss" and "diverged_at_step".

    Raises:
        MethodError: the very first loss is not finite.
    """
    problem = merged.problem
    run = _Run(merged, coefficients, list(parameters), output, loss, training)
    state = problem.journal.load() if problem.journal else None
    if state:
        run.resume(state)
    with tqdm(
        total=training.epochs, initial=run.epoch, desc=description, unit="epoch", disable=not problem.progress
    ) as bar:
        while not run.finished:
            run.train_epoch()
            bar.update()
            if problem.journal:
                problem.journal.save(run.state())
    if run.diverged_at == 0:
        raise MethodError(f"{description}: the first loss is {run.diverged_loss}; look at the models and the data")
    return run.finish()


class _Run:
    """One training run: everything that a journal has to know of it is in :meth:`state`."""

    def __init__(self, merged, coefficients, parameters, output, loss, training: Training) -> None:
        self.merged, self.coefficients, self.parameters = merged, coefficients, parameters
        self.output, self.loss, self.training = output, loss, training
        problem = merged.problem
        self.places, self.held_out = _split(problem.batches, training.holdout, problem.seed)
        self.steps_per_epoch = max(len(places) for places in self.places.values())
        self.streams = {
            name: _shuffled(places, problem.seed + k) for k, (name, places) in enumerate(self.places.items())
        }
        self.optimizer = torch.optim.Adam(parameters, lr=training.lr)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=training.lr_step, gamma=0.1)
        self.epoch = 0
        self.history: list[float] = []
        self.diverged_at: int | None = None
        self.diverged_loss = math.nan
        self.best_loss, self.best_epoch = math.inf, 0
        self.best = self._copy()
        self._finite = self.best  # the parameters at the last finite loss

    @property
    def finished(self) -> bool:
        stalled = bool(self.held_out) and self.epoch - self.best_epoch >= self.training.patience
        return self.diverged_at is not None or self.epoch >= self.training.epochs or stalled

    def train_epoch(self) -> None:
        total = 0.0
        for step in range(self.steps_per_epoch):
            before = self._copy()
            value = self._step()
            if not math.isfinite(value):
                self.diverged_at = self.epoch * self.steps_per_epoch + step
                self.diverged_loss = value
                self._restore(self._finite)
                return
            self._finite = before
            total += value
        self.schedule.step()
        self.history.append(total / self.steps_per_epoch)
        self.epoch += 1
        if self.held_out:
            value = self._held_out_loss()
            if value < self.best_loss:
                self.best_loss, self.best_epoch, self.best = value, self.epoch, self._copy()

    def finish(self) -> dict:
        facts = {
            "steps": self.epoch * self.steps_per_epoch,
            "first_loss": self.history[0] if self.history else math.nan,
            "last_loss": self.history[-1] if self.history else math.nan,
        }
        if self.diverged_at is not None:
            facts["diverged_at_step"] = self.diverged_at
        if self.held_out and self.best_epoch:
            self._restore(self.best)
            facts |= {"best_epoch": self.best_epoch, "held_out_loss": self.best_loss}
        return facts

    def state(self) -> dict:
        return {
            "epoch": self.epoch,
            "history": self.history,
            "parameters": self._copy(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
        }

    def resume(self, state: dict) -> None:
        self.epoch, self.history = state["epoch"], state["history"]
        self.best, self.best_loss, self.best_epoch = state["best"], state["best_loss"], state["best_epoch"]
        self._restore(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        done = self.epoch * self.steps_per_epoch
        self.streams = {name: islice(stream, done, None) for name, stream in self.streams.items()}

    def _step(self) -> float:
        """One step; the loss before it. Parameters are left as they are where that is not finite."""
        self.optimizer.zero_grad()
        self.merged.merge_weights(self.coefficients())
        total = 0.0
        for value in self._losses([(name, next(stream)) for name, stream in self.streams.items()]):
            self.merged.accumulate(value / len(self.streams))
            total += value.item() / len(self.streams)
        if math.isfinite(total):
            self.merged.backward()
            self.optimizer.step()
        return total

    def _held_out_loss(self) -> float:
        with torch.no_grad():
            self.merged.merge_weights(self.coefficients())
            means = [
                sum(value.item() for value in self._losses([(name, place) for place in places])) / len(places)
                for name, places in self.held_out.items()
            ]
        return sum(means) / len(means)

    def _losses(self, chosen: list[tuple[str, int]]) -> Iterator[Tensor]:
        """The losses of the chosen batches (expert, number): sums over those that are run as one."""
        autocast = self.training.autocast
        batches = [self.merged.problem.batches[name][place] for name, place in chosen]
        for group in groups(batches, self.training.together):
            members = [batches[i] for i in group]
            with torch.autocast(self.merged.device.type, torch.bfloat16, enabled=autocast):
                parts = take_apart(self.merged(join(members)), [samples(batch) for batch in members])
                outputs = [self.output(chosen[i][0], part) for i, part in zip(group, parts, strict=True)]
            losses = [
                self.loss(*chosen[i], output.float() if autocast else output)
                for i, output in zip(group, outputs, strict=True)
            ]
            yield torch.stack(losses).sum()

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def _restore(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def _split(batches: dict[str, list], holdout: float, seed: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The numbers of every task's batches to train on, and of those held out; a task keeps one batch to train on."""
    train, held_out = {}, {}
    for k, (name, of_task) in enumerate(batches.items()):
        order = torch.randperm(len(of_task), generator=torch.Generator().manual_seed(seed + k)).tolist()
        count = int(holdout * len(of_task))
        train[name] = sorted(order[count:])
        if count:
            held_out[name] = sorted(order[:count])
    return train, held_out


def _shuffled(places: list[int], seed: int) -> Iterator[int]:
    """The numbers for ever, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(places), generator=generator).tolist():
            yield places[i]
