"""A merged model as a differentiable function of its coefficients, and the loop that learns them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import CalibrationError, MethodError
from statsmerge_ext.layers import Layer


class LayerWiseMergedModel:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l, run with the λ's gradients.

    The weights are merged once a step for all tasks: the tasks' gradients add up on the merged weights and are
    contracted with the task vectors once, ⟨dL/dθ^l, τ_k^l⟩, instead of once a task.

    Attributes:
        layers: the L layers that some expert changed, in the order of the coefficients' rows.

    Raises:
        MethodError: no expert differs from the base.
        CheckpointError: a model holds NaN or infinity.
    """

    def __init__(self, problem: MergeProblem) -> None:
        self.problem = problem
        self.layers: list[Layer] = []
        self._base: list[Tensor] = []
        self._task_vectors: list[list[Tensor]] = [[] for _ in problem.experts]
        for _, parts in groupby(problem.layers, lambda layer: layer.parameter):
            layers = list(parts)
            task_vectors = [problem.task_vectors(layer) for layer in layers]
            if not any(t.any() for of_layer in task_vectors for t in of_layer):
                continue
            self.layers += layers
            self._base += [problem.base_part(layer) for layer in layers]
            for mine, of_expert in zip(self._task_vectors, zip(*task_vectors, strict=True), strict=True):
                mine += of_expert
        if not self.layers:
            raise MethodError("experts: all of them equal the base, so there are no coefficients to learn")
        problem.model.load_state_dict(dict(problem.base), strict=False)
        problem.model.eval().requires_grad_(False)
        self._runner = _Runner(problem.model, problem.forward)
        self._merged: list[Tensor] = []
        self._leaves: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        return self._base[0].device

    def merge_weights(self, coefficients: Tensor) -> None:
        """Run with ``coefficients`` [L, K], or [K] for all layers alike, from now on."""
        self._merged = ops.weighted_merge(self._base, self._task_vectors, coefficients)
        self._leaves = [tensor.detach().requires_grad_() for tensor in self._merged]

    def __call__(self, batch: object) -> object:
        """The merged model's output for ``batch``; its gradients stop at the merged weights."""
        parts: dict[str, list[Tensor]] = {}
        for layer, leaf in zip(self.layers, self._leaves, strict=True):
            parts.setdefault(layer.parameter, []).append(leaf)
        weights = {
            f"model.{key}": (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(self.problem.base[key].dtype)
            for key, tensors in parts.items()
        }
        return functional_call(self._runner, weights, (batch,))

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of a ``loss`` of this model's outputs, on the merged weights and nothing else."""
        loss.backward(inputs=self._leaves)

    def backward(self) -> None:
        """Carry the accumulated gradients on to the coefficients."""
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        torch.autograd.backward(self._merged, gradients)

    def merge_and_unload(self, coefficients: Tensor) -> Solution:
        """The merge with ``coefficients`` [L, K] or [K] as a method's result."""
        with torch.no_grad():
            self.merge_weights(coefficients)
        merged = {layer.name: leaf.detach() for layer, leaf in zip(self.layers, self._leaves, strict=True)}
        parameters: dict[str, Tensor] = {}
        for layer in self.problem.layers:
            base = self.problem.base_part(layer)
            self.problem.store(parameters, layer, base, merged.get(layer.name, base))
        rows = {layer.name: row for row, layer in enumerate(self.layers)}
        table = coefficients.detach().double().cpu()
        if table.dim() == 2:  # one row for each of the problem's layers; those that nobody changed have none
            blank = table.new_full((table.shape[1],), float("nan"))
            table = torch.stack([table[rows[x.name]] if x.name in rows else blank for x in self.problem.layers])
        return Solution(parameters, coefficients=table)


class _Runner(nn.Module):
    """Makes any ``forward(model, batch)`` a module, so that torch can exchange its parameters for the call."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, object], object]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: object) -> object:
        return self._forward(self.model, batch)


def learn_coefficients(
    merged: LayerWiseMergedModel,
    coefficients: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    loss: Callable[[str, int, Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    lr_step: int,
    autocast: bool,
    description: str,
) -> dict:
    """Adam on ``parameters``, one batch of every task a step, the learning rate divided by ten every ``lr_step`` epochs.

    Args:
        merged: the model to train through.
        coefficients: gives the λ [L, K] or [K] as a function of ``parameters``.
        parameters: what is learned.
        loss: (expert, number of its batch, logits) -> scalar; it has no labels to see.
        epochs: passes over the task with the most batches; the others repeat theirs.
        autocast: run the model and its head in bfloat16 where torch.autocast does; merged weights, losses and
            coefficients stay as they are.

    Returns:
        facts for the report: steps, first and last epoch's mean loss.

    Raises:
        MethodError: the loss is not finite, or a setting is out of range.
    """
    if epochs < 1 or lr <= 0 or lr_step < 1:
        raise MethodError(f"epochs, lr, lr_step: expected positive numbers, got {epochs}, {lr}, {lr_step}")
    problem = merged.problem
    steps = max(len(batches) for batches in problem.batches.values())
    streams = {name: _shuffled(batches, problem.seed + k) for k, (name, batches) in enumerate(problem.batches.items())}
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=lr_step, gamma=0.1)
    history = []
    for _ in tqdm(range(epochs), desc=description, unit="epoch", disable=not problem.progress):
        total = 0.0
        for _ in range(steps):
            optimizer.zero_grad()
            merged.merge_weights(coefficients())
            for name, stream in streams.items():
                place, batch = next(stream)
                with torch.autocast(merged.device.type, torch.bfloat16, enabled=autocast):
                    logits = logits_of(problem.heads.get(name), merged(batch))
                value = loss(name, place, logits.float() if autocast else logits) / len(streams)
                merged.accumulate(value)
                total += value.item()
            if not torch.isfinite(torch.tensor(total)):
                raise MethodError(f"{description}: the loss is {total}; try a smaller lr (it is {lr})")
            merged.backward()
            optimizer.step()
        schedule.step()
        history.append(total / steps)
    return {"steps": steps * epochs, "first_loss": history[0], "last_loss": history[-1]}


def is_layer_wise(granularity: str) -> bool:
    """Whether there is a coefficient a layer and expert ("layer") or one an expert ("task").

    Raises MethodError for anything else.
    """
    if granularity not in ("layer", "task"):
        raise MethodError(f"granularity: expected 'layer' or 'task', got {granularity!r}")
    return granularity == "layer"


def logits_of(head: Callable | None, output: object) -> Tensor:
    """``output`` of a model, through ``head`` if there is one, as logits [N, C].

    Raises CalibrationError if that is no tensor of at least two dimensions.
    """
    logits = head(output) if head is not None else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise CalibrationError(
            "heads: expected a head for every expert, or a model whose output is logits [N, C]; got "
            + (f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__)
        )
    return logits


def _shuffled(batches: list, seed: int) -> Iterator[tuple[int, object]]:
    """The batches with their numbers, for ever, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield place, batches[place]
