"""One merge as a method sees it: base, experts, layers, evidence, unlabelled batches.

A method reads task vectors layer by layer and gives a merged task vector for each; where the tensors come from and
where they go is decided here, so that a method never touches files or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext.checkpoints import check_finite
from statsmerge_ext.engine.journal import Journal
from statsmerge_ext.evidence import GramEvidence
from statsmerge_ext.layers import Layer


@dataclass
class Solution:
    """What a method returns.

    Attributes:
        parameters: state dict key -> merged tensor, in the base's dtype, for every parameter.
        coefficients: the λ that were learned or given, [L, K] or [K]; None for methods without.
        learner: what was learned and can be applied to other models, with a ``to_json`` method; None for most.
        notes: JSON-able facts for the report.
    """

    parameters: dict[str, Tensor]
    coefficients: Tensor | None = None
    learner: object | None = None
    notes: dict = field(default_factory=dict)


@dataclass
class MergeProblem:
    """The input of a method.

    Attributes:
        layers: the model's layers.
        base: state dict (or a lazy mapping) of the pretrained model.
        experts: name -> state dict of that expert.
        evidence: Gram evidence, for methods that need "grams".
        model: the architecture, for methods that need "batches" (its weights are not to be relied on).
        forward: runs ``model`` on a batch.
        batches: expert name -> list of unlabelled batches.
        heads: expert name -> function from the model's output to logits.
        base_source, sources: how error messages call the base and each expert (by path, where there is one).
        journal: where a method that takes long keeps its progress, if anywhere.
        seed: for all that is random.
        progress: whether to show progress bars.
    """

    layers: list[Layer]
    base: Mapping[str, Tensor]
    experts: Mapping[str, Mapping[str, Tensor]]
    evidence: GramEvidence | None = None
    model: nn.Module | None = None
    forward: Callable[[nn.Module, object], object] | None = None
    batches: Mapping[str, list] = field(default_factory=dict)
    heads: Mapping[str, Callable] = field(default_factory=dict)
    base_source: str = "base"
    sources: Mapping[str, str] = field(default_factory=dict)
    journal: Journal | None = None
    seed: int = 0
    progress: bool = False

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

    def map_layers(self, merge: Callable[[Layer, Tensor, list[Tensor]], Tensor], **solution) -> Solution:
        """Apply ``merge(layer, base part, task vectors) -> merged part`` to every layer.

        ``solution`` completes the result. Raises CheckpointError where an input holds NaN or infinity.
        """
        parameters: dict[str, Tensor] = {}
        for layer in tqdm(self.layers, desc="Merging", unit="layer", disable=not self.progress):
            base = self.base_part(layer)
            self.store(parameters, layer, base, merge(layer, base, self._differences(layer, base)))
        return Solution(parameters, **solution)

    def store(self, parameters: dict[str, Tensor], layer: Layer, base: Tensor, merged: Tensor) -> None:
        """Put the ``merged`` part of ``layer`` in its place in ``parameters``, in the base's dtype.

        Where nothing changed the base's own bits are kept: zero task vectors give the base back exactly.
        """
        original = self.base[layer.parameter].detach()
        if layer.parameter not in parameters:
            parameters[layer.parameter] = original.clone()
        part = layer.part(parameters[layer.parameter])
        part.copy_(torch.where(merged == base, layer.part(original), merged.to(part.dtype)))

    def _differences(self, layer: Layer, base: Tensor) -> list[Tensor]:
        return [self.expert_part(layer, name) - base for name in self.experts]

    def _read(self, layer: Layer, state: Mapping[str, Tensor], source: str) -> Tensor:
        part = check_finite(layer.parameter, layer.part(state[layer.parameter].detach()), source)
        return part if part.dtype == torch.float64 else part.float()
