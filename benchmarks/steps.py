"""One training step of StatsMerging, the coefficients' gradient, by every route; and what steps take in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import problems
import torch
import torch.nn.functional as F
from harness import seeded
from problems import TASKS, Problem, State
from torch import Tensor, nn
from torch.func import functional_call

from statsmerge_ext.engine.merged_model import LayerWiseMergedModel
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.engine.together import join, samples, take_apart
from statsmerge_ext.layers import find_layers

COEFFICIENT = 0.3


@dataclass
class Step:
    """What one step needs beside the models: coefficients [L, K], a frozen head and a target for every sample.

    With ``autocast`` the model runs in bfloat16 where torch.autocast does; weights and gradients stay float32.
    """

    problem: Problem
    coefficients: Tensor
    head: Tensor
    targets: Tensor
    autocast: bool

    def loss(self, k: int, features: Tensor) -> Tensor:
        return F.cross_entropy(features @ self.head.to(features.dtype), self.targets[k]) / TASKS

    def context(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    def batches(self) -> list[Tensor]:
        return [batch for (batch,) in self.problem.batches.values()]


def step(samples: int, autocast: bool = False) -> Step:
    problem = problems.vit(samples)
    width = problems.VIT_SHAPE["hidden_size"]
    head = torch.randn(width, 100, generator=seeded(1)) / width**0.5
    targets = torch.randint(100, (TASKS, samples), generator=seeded(2))
    problem.batches = {name: [torch.cat(batches)] for name, batches in problem.batches.items()}
    coefficients = torch.full((len(find_layers(problem.model)), TASKS), COEFFICIENT)
    return Step(problem, coefficients, head, targets, autocast)


class OurStep:
    """Merge once, run all tasks' samples as one batch, contract their gradients with the task vectors once."""

    def __init__(self, step: Step) -> None:
        problem = step.problem
        self.step = step
        self.merged = LayerWiseMergedModel(
            MergeProblem(
                layers=find_layers(problem.model),
                base=problem.base,
                experts=problem.experts,
                model=problem.model,
                forward=problem.forward,
            )
        )
        problem.experts.clear()  # the task vectors are all that a step needs

    def __call__(self) -> State:
        coefficients = self.step.coefficients.clone().requires_grad_()
        self.merged.merge_weights(coefficients)
        batches = self.step.batches()
        with self.step.context():
            features = take_apart(self.merged(join(batches)), [samples(batch) for batch in batches])
            loss = sum(self.step.loss(k, part) for k, part in enumerate(features))
        self.merged.accumulate(loss)
        self.merged.backward()
        return {"gradient": coefficients.grad}


class PlainStep:
    """Weights as a function of the coefficients in autograd's own graph, which is walked once a task.

    ``rebuild`` merges anew for every task, as AdaMerging's code does; without it the graph is built once and kept, as
    FusionBench does.
    """

    def __init__(self, step: Step, *, rebuild: bool) -> None:
        problem = step.problem
        self.step, self.rebuild = step, rebuild
        self.model = problem.model.requires_grad_(False)
        self.keys = [layer.parameter for layer in find_layers(problem.model)]
        self.base = problem.base
        self.task_vectors = [
            {key: state[key] - self.base[key] for key in self.keys} for state in problem.experts.values()
        ]
        problem.experts.clear()

    def merge(self, coefficients: Tensor) -> State:
        return {
            key: self.base[key] + sum(coefficients[row, k] * t[key] for k, t in enumerate(self.task_vectors))
            for row, key in enumerate(self.keys)
        }

    def __call__(self) -> State:
        coefficients = self.step.coefficients.clone().requires_grad_()
        forward = _Forward(self.model, self.step.problem.forward)
        merged = None if self.rebuild else self.merge(coefficients)
        for k, batch in enumerate(self.step.batches()):
            weights = self.merge(coefficients) if self.rebuild else merged
            weights = {f"model.{key}": value for key, value in weights.items()}
            with self.step.context():
                loss = self.step.loss(k, functional_call(forward, weights, (batch,)))
            loss.backward(retain_graph=not self.rebuild)
        return {"gradient": coefficients.grad}


class _Forward(nn.Module):
    def __init__(self, model: nn.Module, forward: Callable) -> None:
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, batch: Tensor) -> Tensor:
        return self.function(self.model, batch)


class ForwardBackward:
    """The floor of a step: the model's own forward and backward passes, weights' gradients included.

    The merged weights are the same for all tasks, so their samples may also go ``together``.
    """

    def __init__(self, step: Step, *, together: bool) -> None:
        self.step, self.together = step, together
        step.problem.model.requires_grad_()

    def __call__(self) -> None:
        problem = self.step.problem
        problem.model.zero_grad()
        batches = self.step.batches()
        if self.together:
            with self.step.context():
                features = problem.forward(problem.model, torch.cat(batches)).chunk(TASKS)
                loss = sum(self.step.loss(k, part) for k, part in enumerate(features))
            loss.backward()
            return
        for k, batch in enumerate(batches):
            with self.step.context():
                loss = self.step.loss(k, problem.forward(problem.model, batch))
            loss.backward()


def exact_step(step: Step) -> State:
    """The gradient in float64 by the chain rule: dL/dW of every layer, then ⟨dL/dW, τ_k⟩ for one task vector a time.

    So that it fits the memory of a small machine, no graph reaches over the merge and no task vector is kept.
    """
    problem = step.problem
    model = problem.model.double().requires_grad_()
    layers = find_layers(model)

    def task_vectors(key: str) -> Iterator[Tensor]:
        return (state[key].double() - problem.base[key].double() for state in problem.experts.values())

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for row, layer in enumerate(layers):
            merged = problem.base[layer.parameter].double()
            for k, task_vector in enumerate(task_vectors(layer.parameter)):
                merged += step.coefficients[row, k].double() * task_vector
            parameters[layer.parameter].copy_(merged)
    for k, batch in enumerate(step.batches()):
        step.loss(k, problem.forward(model, batch.double())).backward()
    rows = [
        [(parameters[layer.parameter].grad * t).sum() for t in task_vectors(layer.parameter)]
        if parameters[layer.parameter].grad is not None
        else [torch.zeros((), dtype=torch.float64)] * TASKS
        for layer in layers
    ]
    return {"gradient": torch.stack([torch.stack(row) for row in rows])}


def warmed(run: Callable) -> Callable:
    """A step is one of hundreds, so its first is not the one to time."""
    run()
    return run


class _Experts(Mapping):
    """The state dict of an expert whose tensors are made when they are asked for, as if read from a file."""

    def __init__(self, base: State, seed: int) -> None:
        self._base = base
        self._seeds = {key: 1000 * seed + place for place, key in enumerate(base)}

    def __getitem__(self, key: str) -> Tensor:
        return problems.moved(self._base[key], seeded(self._seeds[key]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class StepsInMemory:
    """Two steps at K = 8, one sample a task, on task vectors stored as ``storage`` says.

    What the process holds before any model, once all libraries have done what they do the first time, is ``held``.
    """

    def __init__(self, storage: str) -> None:
        tiny = problems.vit_model(hidden_size=32, intermediate_size=64, num_attention_heads=2)
        problems.vit_forward(tiny, self._images(1)).square().sum().backward()
        del tiny
        self.held = _resident_after_trimming()
        model = problems.vit_model()
        base = model.state_dict()  # its tensors are the model's own
        experts = {f"task{k}": _Experts(base, k) for k in range(TASKS)}
        problem = MergeProblem(find_layers(model), base, experts, model=model, forward=problems.vit_forward)
        self.merged = LayerWiseMergedModel(problem, storage=storage)
        self.weights = sum(4 * parameter.numel() for parameter in model.parameters())
        _resident_after_trimming()

    def __call__(self) -> dict[str, int]:
        """Returns ``held`` and the bytes that cannot be done without: base, merged weights, gradient, task vectors."""
        for _ in range(2):
            coefficients = torch.full((len(self.merged.layers), TASKS), COEFFICIENT, requires_grad=True)
            self.merged.merge_weights(coefficients)
            for batch in self._images(TASKS).split(1):
                self.merged.accumulate(self.merged(batch).square().sum())
            self.merged.backward()
        vectors = self.merged.task_vectors
        stored = sum(part.nbytes for part in (*vectors.tensors, *vectors.scales, *vectors.zero_points))
        return {"held": self.held, "bytes": 3 * self.weights + stored}

    @staticmethod
    def _images(count: int) -> Tensor:
        side = problems.VIT_SHAPE["image_size"]
        return torch.randn(count, 3, side, side, generator=seeded())


def _resident_after_trimming() -> int:
    """Bytes held, without what was freed and is kept for later: building takes many a temporary that steps do not."""
    ctypes.CDLL(None).malloc_trim(0)
    return problems.resident("VmRSS")
