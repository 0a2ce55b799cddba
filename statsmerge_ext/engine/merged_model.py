"""A merged model as a differentiable function of its coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call

from statsmerge_ext import ops
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer

SPACES = ("task_vectors", "weights")
#: In what form task vectors wait for the next step; the codes are quantised by :class:`ops.QuantizedTensor`.
STORAGES = ("full", "bfloat16", "int8", "int4", "int3", "int2")


class LayerWiseMergedModel:
    """θ^l = θ_0^l + Σ_k λ_k^l τ_k^l, run with the λ's gradients; in the space "weights", θ^l = Σ_k λ_k^l θ_k^l.

    The weights are merged once a step for all tasks: the tasks' gradients add up on the merged weights and are
    contracted with the task vectors once, ⟨dL/dθ^l, τ_k^l⟩, instead of once a task.

    Args:
        problem: the models; its ``model`` is used up.
        space: what the coefficients weigh, one of :data:`SPACES`.
        storage: in what form that is kept, one of :data:`STORAGES`; "full" is the dtype that merging computes in.
        prepare: (task vectors, layer) -> what is made of them before they are kept.

    Attributes:
        layers: the L layers that some expert changed, in the order of the coefficients' rows.
        task_vectors: what the coefficients weigh, as it is stored.

    Raises:
        MethodError: no expert differs from the base, or an argument is none of its choices.
        CheckpointError: a model holds NaN or infinity.
    """

    def __init__(
        self,
        problem: MergeProblem,
        *,
        space: str = "task_vectors",
        storage: str = "full",
        prepare: Callable[[Sequence[Tensor], Layer], Sequence[Tensor]] = lambda task_vectors, layer: task_vectors,
    ) -> None:
        if storage not in STORAGES:
            raise MethodError(f"storage: expected one of {STORAGES}, got {storage!r}")
        self.problem = problem
        self.layers: list[Layer] = []
        self._base: list[Tensor] = []
        kept: list[list[Tensor | ops.QuantizedTensor]] = [[] for _ in problem.experts]
        for _, parts in groupby(problem.layers, lambda layer: layer.parameter):
            layers = list(parts)
            task_vectors = [problem.task_vectors(layer) for layer in layers]
            if not any(t.any() for of_layer in task_vectors for t in of_layer):
                continue
            for layer, of_layer in zip(layers, task_vectors, strict=True):
                base, moved = weighed(space, problem.base_part(layer), prepare(of_layer, layer))
                self.layers.append(layer)
                self._base.append(base)
                for mine, tensor in zip(kept, moved, strict=True):
                    mine.append(_stored(tensor, storage))
        if not self.layers:
            raise MethodError("experts: all of them equal the base, so there are no coefficients to learn")
        self.task_vectors = ops.prepare_task_vectors(kept, self._base)
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
        self._merged, self._leaves = [], []  # what the last step merged and its gradients are given back first
        self._merged = ops.weighted_merge(self._base, self.task_vectors, coefficients)
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


def is_layer_wise(granularity: str) -> bool:
    """Whether there is a coefficient a layer and expert ("layer") or one an expert ("task").

    Raises MethodError for anything else.
    """
    if granularity not in ("layer", "task"):
        raise MethodError(f"granularity: expected 'layer' or 'task', got {granularity!r}")
    return granularity == "layer"


def weighed(space: str, base: Tensor, task_vectors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Where the coefficients of ``space`` start from in a layer, and the K tensors that they weigh.

    Raises MethodError for a space that is none of :data:`SPACES`.
    """
    if space not in SPACES:
        raise MethodError(f"space: expected one of {SPACES}, got {space!r}")
    if space == "task_vectors":
        return base, task_vectors
    return torch.zeros_like(base), [base + task_vector for task_vector in task_vectors]


def _stored(tensor: Tensor, storage: str) -> Tensor | ops.QuantizedTensor:
    if storage == "full":
        return tensor
    return tensor.bfloat16() if storage == "bfloat16" else ops.QuantizedTensor.quantize(tensor, int(storage[3:]))
