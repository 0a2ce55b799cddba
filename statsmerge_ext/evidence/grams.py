"""Gram evidence: the sums that the closed-form methods solve.

For a layer with inputs X_k [tokens, in] in expert k and task vector T_k [out, in], with G_k = X_kᵀ X_k, only
C = Σ_k G_k and D = Σ_k T_k G_k are kept (LOT Merging, arXiv 2505.23859, Eq. 9), and of each G_k its diagonal, which
RegMean's shrinkage needs. For norm scales and embeddings G_k is diagonal, and is kept for each expert.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.checkpoints import check_finite
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.errors import CalibrationError
from statsmerge_ext.evidence.artefact import load_artefact, save_artefact
from statsmerge_ext.evidence.borrowed import borrow, borrowing_copy
from statsmerge_ext.evidence.observe import Observation, observe
from statsmerge_ext.evidence.triangle import TriangleSum
from statsmerge_ext.layers import Layer

FORMAT = "statsmerge-grams-1"


@dataclass
class GramEvidence:
    """Everything the closed forms need to know about K experts' calibration samples.

    Attributes:
        experts: names of the experts, in order.
        leaders: layer name -> name of the layer that holds its Gram matrix; layers with the same input share one.
        grams: leader -> C = Σ_k G_k, [groups, in, in], symmetric.
        products: layer -> D = Σ_k T_k G_k, [groups, out / groups, in].
        diagonals: leader -> diag(G_k), [K, groups, in].
        weights: norm scale -> Σ x̂², [K, *scale shape]; embedding -> token counts, [K, rows].
        provenance: JSON-able facts: fingerprints of the models, samples and tokens seen.
    """

    experts: list[str]
    leaders: dict[str, str] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)
    diagonals: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    _TENSORS: ClassVar = ("grams", "products", "diagonals", "weights")

    @property
    def seen(self) -> set[str]:
        """The names of the layers that there is evidence of: a module that was never called has none."""
        return {*self.products, *self.weights}

    def shallow_copy(self) -> GramEvidence:
        """The same sums, which whoever holds the copy can drop one by one."""
        return replace(self, **{kind: dict(getattr(self, kind)) for kind in self._TENSORS})

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically. Raises CheckpointError when it cannot be written."""
        tensors = {f"{kind}/{name}": t for kind in self._TENSORS for name, t in getattr(self, kind).items()}
        facts = {"experts": self.experts, "leaders": self.leaders, "provenance": self.provenance}
        save_artefact(path, FORMAT, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> GramEvidence:
        """Read what :meth:`save` wrote. Raises CheckpointError for an unreadable file and CalibrationError for a
        readable one that holds something else."""
        file, facts = load_artefact(path, FORMAT)
        evidence = cls(**facts)
        for key in file:
            kind, _, name = key.partition("/")
            getattr(evidence, kind)[name] = file[key]
        return evidence

    def check_models(self, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raise CalibrationError unless this evidence was collected from exactly these models in this order."""
        if self.experts != list(experts):
            raise CalibrationError(f"evidence is of the experts {self.experts}, the merge is of {list(experts)}")
        known = self.provenance["fingerprints"]
        for label, state, expected in [("base", base, known["base"])] + [
            (f"expert {name!r}", state, known["experts"][name]) for name, state in experts.items()
        ]:
            if fingerprint(state) != expected:
                raise CalibrationError(f"evidence was collected from another {label}: its weights' fingerprint differs")


def collect_grams(
    model: nn.Module,
    layers: list[Layer],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    calibration: Mapping[str, Iterable],
    *,
    forward: Callable[[nn.Module, object], object],
    gram_dtype: torch.dtype = torch.float32,
    share_inputs: bool = True,
    progress: bool = False,
) -> GramEvidence:
    """Sweep once through each expert's calibration samples and sum what its layers see.

    Memory beyond the result is one expert's Gram matrices, whatever the number of experts.

    Args:
        model: the architecture. It is not changed.
        layers: of :func:`~statsmerge_ext.layers.find_layers`.
        base, experts: state dicts of ``model``; the experts' order is kept.
        calibration: expert name -> batches without labels. A batch with an ``attention_mask`` [N, T] has its
            padding left out of every sum.
        forward: runs the model on a batch.
        gram_dtype: float64 keeps what float32 features know of small directions, in twice the memory.
        share_inputs: layers that read the same tensor share a Gram matrix.
        progress: show a progress bar.

    Raises:
        CalibrationError: no batches for an expert, or layers that shared an input in one batch and not in another.
    """
    names = list(experts)
    evidence = GramEvidence(names)
    shapes = {layer.name: base[layer.parameter].shape for layer in layers}
    collector = Collector(evidence.leaders, shapes, gram_dtype, share_inputs)
    samples, tokens = {}, {}
    model = borrowing_copy(model).eval()
    for k, name in enumerate(tqdm(names, desc="Gram matrices", unit="expert", disable=not progress)):
        collector.start_expert()
        borrow(model, experts[name])
        samples[name] = 0
        with torch.no_grad(), observe(model, layers, collector.receive):
            for batch in calibration[name]:
                samples[name] += collector.start_batch(batch)
                forward(model, batch)
        if not samples[name]:
            raise CalibrationError(f"calibration: no batches for expert {name!r}: expected at least one sample")
        add_expert(evidence, collector, layers, base, experts[name], k)
        tokens[name] = dict(collector.tokens)
    finish(evidence, collector)
    fingerprints = {
        "base": fingerprint(base),
        "experts": {name: fingerprint(state) for name, state in experts.items()},
    }
    evidence.provenance = {"fingerprints": fingerprints, "samples": samples, "tokens": tokens}
    return evidence


def finish(evidence: GramEvidence, collector: Collector) -> None:
    """Give ``evidence`` the sums of Gram matrices over all experts, which ``collector`` is relieved of."""
    collector.grams.clear()
    for leader in list(collector.totals):
        evidence.grams[leader] = collector.totals.pop(leader).whole()


def add_expert(
    evidence: GramEvidence,
    collector: Collector,
    layers: list[Layer],
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    k: int,
) -> None:
    """Add what ``collector`` has summed of expert number ``k`` to ``evidence``; of one expert it may come in parts.

    Raises CheckpointError where a weight that a Gram matrix belongs to holds NaN or infinity.
    """
    count = len(evidence.experts)
    for leader, gram in collector.grams.items():
        ops.symmetrize_(gram)
        diagonals = evidence.diagonals.setdefault(leader, gram.new_zeros(count, *gram.shape[:2]))
        diagonals[k] += gram.diagonal(dim1=-2, dim2=-1)
        if leader not in collector.totals:
            collector.totals[leader] = TriangleSum(gram)
        collector.totals[leader].add(gram)
    for name, weights in collector.weights.items():
        evidence.weights.setdefault(name, weights.new_zeros(count, *weights.shape))[k] += weights
    for layer in layers:
        gram = collector.grams.get(evidence.leaders.get(layer.name))
        if gram is None:
            continue
        task_vector = layer.part(expert[layer.parameter]).to(gram) - layer.part(base[layer.parameter]).to(gram)
        if not math.isfinite(task_vector.sum()):  # as in check_finite; the difference proves it of both
            check_finite(layer.parameter, base[layer.parameter], "base")
            check_finite(layer.parameter, expert[layer.parameter], f"expert {evidence.experts[k]!r}")
        matrices = layer.matrices(task_vector)
        if layer.name not in evidence.products:
            evidence.products[layer.name] = torch.zeros_like(matrices)
        ops.gram_accumulate_(evidence.products[layer.name], matrices.mT, other=gram)


class Collector:
    """The sums over one expert's samples, the Grams' over all experts so far, and who shares what."""

    def __init__(
        self,
        leaders: dict[str, str],
        shapes: Mapping[str, torch.Size],
        gram_dtype: torch.dtype,
        share_inputs: bool,
    ) -> None:
        self.leaders = leaders
        self.shapes = shapes
        self.gram_dtype = gram_dtype
        self.share_inputs = share_inputs
        self.grams: dict[str, Tensor] = {}
        self.totals: dict[str, TriangleSum] = {}

    def start_expert(self) -> None:
        for gram in self.grams.values():  # not made anew among a pass's activations: the heap would get holes
            gram.zero_()
        self.weights: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def start_batch(self, batch: object) -> int:
        """Prepare for the forward pass of ``batch``; returns its number of samples."""
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.seen: dict[tuple, tuple[weakref.ref, str]] = {}
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
        return first.shape[0]

    def receive(self, observation: Observation) -> None:
        for layer in observation.layers:
            if layer.kind == "embedding":
                self._add_counts(layer, observation)
            elif layer.kind == "scale":
                self._add_squares(layer, observation)
            elif self._leader(layer, observation) == layer.name:
                self._add_gram(layer, observation)

    def _leader(self, layer: Layer, observation: Observation) -> str:
        """The layer whose Gram matrix holds this input: the first that saw the very same tensor in this pass."""
        x = observation.input
        leader = layer.name
        if self.share_inputs:
            key = (id(x), x._version, observation.view)
            reference, first = self.seen.get(key, (None, None))
            if reference is not None and reference() is x:
                leader = first
            else:
                self.seen[key] = (weakref.ref(x), leader)
        if self.leaders.setdefault(layer.name, leader) != leader:
            raise CalibrationError(
                f"layer {layer.name!r} shared its input with {self.leaders[layer.name]!r} before and with {leader!r} "
                "now: the model's graph depends on its data; pass share_inputs=False"
            )
        return leader

    def _add_gram(self, layer: Layer, observation: Observation) -> None:
        x = observation.features()
        geometry = observation.view if layer.source == "patches" else None
        if geometry is None:
            tokens, groups, columns = x.shape[:-1], 1, x.shape[-1]
        else:
            outputs = geometry.outputs(x.shape[2:])
            tokens, groups = torch.Size([x.shape[0] * math.prod(outputs)]), geometry.groups
            columns = x.shape[1] // groups * math.prod(geometry.kernel_size)
        if layer.name not in self.grams:
            self.grams[layer.name] = x.new_zeros(groups, columns, columns, dtype=self.gram_dtype)
        weight = self._token_weight(observation, tokens)
        count = tokens.numel() if weight is None else int(weight.sum())
        self.tokens[layer.name] = self.tokens.get(layer.name, 0) + count
        if geometry is None:
            weight = None if weight is None else weight.unsqueeze(0)
            ops.gram_accumulate_(self.grams[layer.name], x.unsqueeze(0), weight=weight)
        else:
            weight = None if weight is None else weight.reshape(x.shape[0], *outputs)
            ops.gram_accumulate_patches_(self.grams[layer.name], x, **vars(geometry), weight=weight)

    def _add_squares(self, layer: Layer, observation: Observation) -> None:
        x = observation.features()
        tokens = x.shape[: x.dim() - len(self.shapes[layer.name])]
        weight = self._token_weight(observation, tokens)
        # A batch is summed in its own precision, batches in the evidence's: these only weigh means, nothing is solved.
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square_().reshape(-1, *self.shapes[layer.name])
        if weight is not None:
            squares *= weight.reshape(-1, *[1] * (squares.dim() - 1))
        self._add_weights(layer, squares.sum(0).to(self.gram_dtype))

    def _add_counts(self, layer: Layer, observation: Observation) -> None:
        rows = observation.features()
        weight = self._token_weight(observation, rows.shape)
        weight = None if weight is None else weight.flatten()
        counts = torch.bincount(rows.flatten(), weight, minlength=self.shapes[layer.name][0])
        self._add_weights(layer, counts.to(self.gram_dtype))

    def _add_weights(self, layer: Layer, weights: Tensor) -> None:
        known = self.weights.get(layer.name)
        self.weights[layer.name] = weights if known is None else known + weights

    def _token_weight(self, observation: Observation, tokens: torch.Size) -> Tensor | None:
        """The mask's weights for an input whose leading dimensions are ``tokens``; None where every row counts."""
        weight = observation.token_weight(self.mask, tokens)
        return None if weight is None else weight.to(self.gram_dtype)
