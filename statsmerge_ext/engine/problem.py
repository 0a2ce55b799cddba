"""One merge as a method sees it: base, experts, layers, evidence, unlabelled batches.

A method says what becomes of the task vectors of a layer, or of some of its elements; where the tensors come from, how
many of them are in memory and where they go is decided here, so that a method never touches files or devices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext.checkpoints import check_finite
from statsmerge_ext.checkpoints.compatibility import shape_of
from statsmerge_ext.engine.journal import Journal
from statsmerge_ext.engine.streaming import BLOCK, Piece, Stream, layer_shape
from statsmerge_ext.evidence import GramEvidence
from statsmerge_ext.layers import Layer

if TYPE_CHECKING:
    from statsmerge_ext.engine.layer_by_layer import Passes


@dataclass
class Solution:
    """What a method returns.

    Attributes:
        parameters: state dict key -> merged tensor, in the base's dtype, for every parameter; perhaps computed only
            when it is asked for.
        coefficients: the λ that were learned or given, [L, K] or [K]; None for methods without.
        is_weighted_sum: whether the parameters are the base plus the task vectors, weighted by the coefficients.
        learner: what was learned and can be applied to other models, with a ``to_json`` method; None for most.
        notes: JSON-able facts for the report; what they say of layers is a mapping from layers' names.
    """

    parameters: Mapping[str, Tensor]
    coefficients: Tensor | None = None
    is_weighted_sum: bool = False
    learner: object | None = None
    notes: Mapping[str, object] = field(default_factory=dict)


@dataclass
class MergeProblem:
    """The input of a method.

    Attributes:
        layers: the layers that are to be merged.
        base: state dict (or a lazy mapping) of the pretrained model.
        experts: name -> state dict of that expert.
        evidence: Gram evidence, for methods that need "grams"; theirs to take apart.
        model: the architecture, for methods that need "batches" (its weights are not to be relied on).
        forward: runs ``model`` on a batch.
        batches: expert name -> list of unlabelled batches.
        passes: forward passes through the layers, for methods in execution order; None: through the whole ``model``.
        heads: expert name -> function from the model's output to logits.
        base_source, sources: how error messages call the base and each expert (by path, where there is one).
        journal: where a method that takes long keeps its progress, if anywhere.
        seed: for all that is random.
        progress: whether to show progress bars.
        memory_budget: bytes that models read from disk may take at a time; None: a default, exceeded where it must.
        model_layers: all layers of the model, where ``layers`` are some of them; None: they are all.
    """

    layers: list[Layer]
    base: Mapping[str, Tensor]
    experts: Mapping[str, Mapping[str, Tensor]]
    evidence: GramEvidence | None = None
    model: nn.Module | None = None
    forward: Callable[[nn.Module, object], object] | None = None
    batches: Mapping[str, list] = field(default_factory=dict)
    passes: Passes | None = None
    heads: Mapping[str, Callable] = field(default_factory=dict)
    base_source: str = "base"
    sources: Mapping[str, str] = field(default_factory=dict)
    journal: Journal | None = None
    seed: int = 0
    progress: bool = False
    memory_budget: int | None = None
    model_layers: list[Layer] | None = None

    def __post_init__(self) -> None:
        if self.model_layers is None:
            self.model_layers = self.layers

    def stream(self, layers: Iterable[Layer], *, whole: bool, alone: Container[str] = ()) -> Stream:
        """The pieces of ``layers`` of base and experts, within the memory budget. Raises MethodError as its class."""
        experts, budget = self.experts.values(), self.memory_budget
        return Stream(self.base, experts, layers, whole=whole, alone=alone, memory_budget=budget)

    def differences(self, layer: Layer, base: Tensor, experts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Corresponding elements of base and experts as merging computes with them: base, and the task vectors.

        ``experts`` may be empty, for a layer that is merged without them. Raises CheckpointError where one holds NaN or
        infinity.
        """
        reference = _computed(base)
        if not experts:
            check_finite(layer.parameter, base, self.base_source)
            return reference, []
        task_vectors = [_computed(expert) - reference for expert in experts]
        for name, expert, task_vector in zip(self.experts, experts, task_vectors, strict=True):
            # As in check_finite; the difference proves it of both.
            if not math.isfinite(task_vector.sum()):
                check_finite(layer.parameter, base, self.base_source)
                check_finite(layer.parameter, expert, self.sources.get(name, f"expert {name!r}"))
        return reference, task_vectors

    def base_part(self, layer: Layer) -> Tensor:
        """``layer`` of the base, in the dtype that merging computes in (float32, or float64 if the base is).

        Raises CheckpointError if it holds NaN or infinity.
        """
        return self._read(layer, self.base, self.base_source)

    def expert_part(self, layer: Layer, name: str) -> Tensor:
        """``layer`` of the expert called ``name``, as :meth:`base_part`."""
        return self._read(layer, self.experts[name], self.sources.get(name, f"expert {name!r}"))

    def task_vector(self, layer: Layer, name: str) -> Tensor:
        """τ = θ_k − θ_0 of ``layer`` for the expert called ``name``, in the dtype of :meth:`base_part`."""
        return self.expert_part(layer, name) - self.base_part(layer)

    def task_vectors(self, layer: Layer) -> list[Tensor]:
        """τ_k = θ_k − θ_0 of ``layer`` for every expert, in the dtype of :meth:`base_part`.

        Raises CheckpointError if an expert holds NaN or infinity.
        """
        return self._differences(layer, self.base_part(layer))

    def map_layers(
        self, merge: Callable[[Layer, Tensor, list[Tensor]], Tensor], *, alone: Container[str] = (), **solution
    ) -> Solution:
        """The solution that applies ``merge(layer, base part, task vectors) -> merged part`` to every layer.

        Of the layers whose names are in ``alone`` the experts are not read and the task vectors are an empty list.
        ``solution`` completes the result. What is computed raises CheckpointError where an input holds NaN or infinity.
        """

        def of_piece(piece: Piece, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
            return merge(piece.layer, base, task_vectors)

        return Solution(MappedLayers(self, of_piece, whole=True, alone=alone), **solution)

    def map_elements(self, merge: Callable[[Piece, Tensor, list[Tensor]], Tensor], **solution) -> Solution:
        """As :meth:`map_layers`, for methods whose merged elements depend on the same elements of the models alone.

        ``merge(piece, base, task vectors)`` gets flat tensors of some of a layer's elements: on the CPU at most
        :data:`BLOCK`, so that intermediate results stay in the cache. It is called from several threads at once.
        """
        return Solution(MappedLayers(self, merge, whole=False), **solution)

    def store(self, parameters: dict[str, Tensor], layer: Layer, base: Tensor, merged: Tensor) -> None:
        """Put the ``merged`` part of ``layer`` in its place in ``parameters``, in the base's dtype.

        Where nothing changed the base's own bits are kept: zero task vectors give the base back exactly.
        """
        original = self.base[layer.parameter].detach()
        if layer.parameter not in parameters:
            parameters[layer.parameter] = original.clone()
        part = layer.part(parameters[layer.parameter])
        part.copy_(_settled(layer.part(original), base, merged))

    def _differences(self, layer: Layer, base: Tensor) -> list[Tensor]:
        return [self.expert_part(layer, name) - base for name in self.experts]

    def _read(self, layer: Layer, state: Mapping[str, Tensor], source: str) -> Tensor:
        return _computed(check_finite(layer.parameter, layer.part(state[layer.parameter].detach()), source))


class MergedLayers(Mapping[str, Tensor]):
    """The merged parameters of a model, computed when they are asked for, piece by piece."""

    def __init__(self, problem: MergeProblem) -> None:
        self._problem = problem
        self._layers: dict[str, list[Layer]] = {}
        for layer in problem.layers:
            self._layers.setdefault(layer.parameter, []).append(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __getitem__(self, name: str) -> Tensor:
        return self._computed([name])[name]

    def computed(self) -> dict[str, Tensor]:
        """All of them, in one sweep through the models."""
        return self._computed(self._layers)

    @abstractmethod
    def stream(self, names: Iterable[str]) -> Stream:
        """The pieces of the parameters ``names``, for :meth:`merged`. Raises MethodError as :class:`Stream`."""

    @abstractmethod
    def merged(self, piece: Piece, base: Tensor, experts: list[Tensor]) -> Tensor:
        """The merged ``piece``, flat, in the base's dtype, from what base and experts hold there."""

    def _computed(self, names: Iterable[str]) -> dict[str, Tensor]:
        stream = self.stream(names)
        parameters: dict[str, Tensor] = {}
        with tqdm(total=len(stream.pieces), desc="Merging", unit="piece", disable=not self._problem.progress) as bar:
            for piece, merged in stream.results(self.merged):
                name = piece.layer.parameter
                if name not in parameters:
                    parameters[name] = merged.new_empty(shape_of(self._problem.base, name))
                start = piece.start(self._problem.base)
                parameters[name].view(-1)[start : start + piece.count] = merged
                bar.update()
        return parameters


class MappedLayers(MergedLayers):
    """What a function makes of every layer.

    Args:
        problem: the models.
        merge: (piece, base, task vectors) -> merged: of whole layers in their shapes, or of some of their elements.
        whole: which of the two.
        alone: as in :meth:`MergeProblem.map_layers`.
    """

    def __init__(
        self,
        problem: MergeProblem,
        merge: Callable[[Piece, Tensor, list[Tensor]], Tensor],
        *,
        whole: bool,
        alone: Container[str] = (),
    ) -> None:
        super().__init__(problem)
        self._merge, self._whole, self._alone = merge, whole, alone

    def stream(self, names: Iterable[str]) -> Stream:
        layers = [layer for name in names for layer in self._layers[name]]
        return self._problem.stream(layers, whole=self._whole, alone=self._alone)

    def merged(self, piece: Piece, base: Tensor, experts: list[Tensor]) -> Tensor:
        if self._whole:
            shape = layer_shape(self._problem.base, piece.layer)
            return self._of(piece, base.view(shape), [expert.view(shape) for expert in experts]).reshape(-1)
        step = BLOCK if base.device.type == "cpu" else max(piece.count, 1)
        if piece.count <= step:
            return self._of(piece, base, experts)
        out = torch.empty_like(base)
        for start in range(0, piece.count, step):
            cut = slice(start, start + step)
            block = Piece(piece.layer, piece.first + start, len(base[cut]))
            out[cut] = self._of(block, base[cut], [expert[cut] for expert in experts])
        return out

    def _of(self, piece: Piece, base: Tensor, experts: list[Tensor]) -> Tensor:
        reference, task_vectors = self._problem.differences(piece.layer, base, experts)
        return _settled(base, reference, self._merge(piece, reference, task_vectors))


def _computed(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype that merging computes in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _settled(base: Tensor, reference: Tensor, merged: Tensor) -> Tensor:
    """``merged`` in the dtype of ``base``; where it is the ``reference``, the base as computed with, base's bits."""
    settled = merged.to(base.dtype)
    # Only a zero can come back with other bits, those of the other sign; comparing takes longer than looking for one.
    if reference.numel() and reference.abs().amin() > 0:
        return settled
    return torch.where(merged == reference, base, settled)
