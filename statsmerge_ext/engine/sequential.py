"""Layers merged in execution order, on what the merged model itself feeds them.

The experts' forward passes and those of the merged model go through the layers in lockstep. When they have come to a
layer, what each expert makes of its own input there is set against the input that the merged model has there by now: a
method fits one to the other, so that the layer makes up for what all layers before it left over. Its weights are
replaced, and the passes go on. Each layer runs once for every expert and once for the merged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.calibration import Batch
from statsmerge_ext.engine.affine import Affine, batch_norm_map, divisible, shifts_of
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.dataflow import Flow, trace_dataflow
from statsmerge_ext.engine.lockstep import Step, lockstep, sharing_copy
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.together import groups, join
from statsmerge_ext.evidence.observe import Observation
from statsmerge_ext.layers import CHANNEL_NORMS, Layer

# Batches that are alike are run together up to so many samples: fewer passes to keep in step.
_SAMPLES_TOGETHER = 64


@dataclass(frozen=True)
class ExpertEvidence:
    """What one expert says of a layer.

    Attributes:
        map: the expert's own layer; with the BatchNorm after it where there is one, less the merged model's.
        moments: of the merged model's inputs, and of what the merged layer should make of them: what the expert's
            layer makes of the expert's inputs, plus what the residual connection around it lacks by now.
    """

    map: Affine
    moments: Moments


@dataclass(frozen=True)
class LayerEvidence:
    """A layer that is to be solved.

    Attributes:
        layer: of kind "linear", "conv" or "scale".
        base: the base's layer.
        shifted: the shift is to be fitted too. It is the layer's bias, or that of the BatchNorm after it.
        normed: there is a BatchNorm after it, whose factors are those of the experts' mean.
        experts: gives the experts' evidence one by one, once; each is computed when it is asked for.
    """

    layer: Layer
    base: Affine
    shifted: bool
    normed: bool
    experts: Iterator[ExpertEvidence]


#: Gives a layer's matrices [groups, out, in] and its shift [groups, out], None unless it is shifted; or None for both,
#: to leave the layer at the experts' mean.
Fit = Callable[[LayerEvidence], tuple[Tensor, Tensor | None] | None]


def merge_in_execution_order(
    problem: MergeProblem, fit: Fit, *, shifts: bool = True, surroundings: bool = True, feature_mix: float = 0.0
) -> Solution:
    """Merge by solving each layer with ``fit``, once all layers before it are merged.

    Linear layers, convolutions and the scales of norms are solved together with their biases. A BatchNorm with frozen
    statistics is one affine map with the layer before it, and a residual connection one target; both are found by
    :func:`~statsmerge_ext.engine.dataflow.trace_dataflow`. Without ``surroundings`` each layer is solved by itself,
    without ``shifts`` even each weight, and biases are the mean. The inputs that are fitted are the merged model's, or
    with a ``feature_mix`` α those and α of the way to the expert's own. Embeddings are means of the experts' rows
    weighted by token counts. All else starts and stays as the experts' mean: layers that are never called, bare
    parameters, the statistics of BatchNorm. Up to the first layer that some expert changed, everything is the base's
    own.

    A layer that is called several times in a forward pass is solved at each call from the sums over all calls so far:
    what comes after a call sees what was known then, and the last solution stands.

    Raises what the forward passes raise.
    """
    return _SequentialMerge(problem, fit, shifts, surroundings, feature_mix).run()


class _SequentialMerge:
    def __init__(self, problem: MergeProblem, fit: Fit, shifts: bool, surroundings: bool, feature_mix: float) -> None:
        self._problem, self._fit, self._feature_mix = problem, fit, feature_mix
        self._shifts = shifts_of(problem.layers) if shifts else {}
        self._batches: list[tuple[str, Batch]] = [
            (name, join([batches[place] for place in places]))
            for name, batches in problem.batches.items()
            for places in groups(batches, _SAMPLES_TOGETHER)
        ]
        start = problem.map_layers(lambda layer, base, task_vectors: base + torch.stack(task_vectors).mean(0))
        self._buffers = merge_buffers(problem, start.parameters, reestimate=False)
        model = problem.model.eval()
        self._experts = {name: _with_state(model, state) for name, state in problem.experts.items()}
        model.load_state_dict({**self._buffers, **start.parameters}, strict=False)
        self._merged = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._flows = trace_dataflow(model, problem.layers, problem.forward, _one_sample(self._batches[0][1]))
        if not (shifts and surroundings):
            self._flows = {name: replace(flow, norm=None, skip=None) for name, flow in self._flows.items()}
        self._skips: dict[str, list] = {}  # layer -> what its residual connection carries, a pair a batch
        self._sums: dict[tuple[str, str], Moments] = {}  # of layers that are called again, and experts
        self._counts: dict[str, Tensor] = {}  # of each embedding's rows, [K, rows]
        self._seen: set[str] = set()
        self._solved_norms: set[str] = set()  # together with the layers before them
        self._changed = False

    def run(self) -> Solution:
        problem = self._problem
        passes = [(self._experts[name], batch) for name, batch in self._batches]
        passes += [(self._merged, batch) for _, batch in self._batches]
        progress = tqdm(total=len(self._flows), desc="Merging", unit="layer", disable=not problem.progress)
        with torch.no_grad(), progress, closing(lockstep(passes, problem.layers, problem.forward)) as steps:
            for step in steps:
                for layer in step.layers:
                    self._arrive(layer, step)
                    progress.update()
        return Solution(
            {layer.parameter: self._parameters[layer.parameter].detach() for layer in problem.layers},
            notes={"never_called": [x.name for x in problem.layers if x.source and x.name not in self._seen]},
        )

    def _arrive(self, layer: Layer, step: Step) -> None:
        """All passes are about to call ``layer``: merge it, and put the result where they will find it."""
        half = len(self._batches)
        calls = [
            _Call(name, batch, own, now)
            for (name, batch), own, now in zip(self._batches, step.arrivals[:half], step.arrivals[half:], strict=True)
        ]
        if not any(call.now for call in calls):
            return
        self._seen.add(layer.name)
        for name, flow in self._flows.items():
            if flow.skip == layer.name:
                self._skips[name] = [call.inputs() for call in calls]
        parts = [part for part in (layer, self._shifts.get(layer.name)) if part]
        self._changed = self._changed or any(bool(t.any()) for part in parts for t in self._problem.task_vectors(part))
        if self._changed and layer.kind == "embedding":
            self._average_rows(layer, calls)
        elif self._changed and layer.name not in self._solved_norms:
            self._solve(layer, calls)
        self._skips.pop(layer.name, None)

    def _solve(self, layer: Layer, calls: list[_Call]) -> None:
        flow, shift = self._flows.get(layer.name, Flow()), self._shifts.get(layer.name)
        norm = flow.norm and self._merged.get_submodule(flow.norm.module)
        if norm is not None:
            scale, summand = batch_norm_map(norm, flow.norm.module, {**self._buffers, **self._parameters})
            scale = divisible(scale)

        def affine(part: Callable[[Layer], Tensor]) -> Affine:
            return Affine(layer, part(layer) + flow.offset, shift and part(shift))

        def experts() -> Iterator[ExpertEvidence]:
            for name, state in self._problem.experts.items():
                own = affine(lambda part, name=name: self._problem.expert_part(part, name))
                if norm is not None:
                    own_scale, own_summand = batch_norm_map(norm, flow.norm.module, state)
                    own = own.then(own_scale / scale, (own_summand - summand) / scale)
                moments = self._sums.pop((layer.name, name), None) or Moments.zeros_like(own.matrices)
                for place, call in enumerate(calls):
                    if call.expert == name and call.now:
                        lacking = self._lacking(layer, place, 1 if norm is None else scale)
                        _add(moments, call, own, lacking, self._feature_mix)
                if flow.calls > 1:
                    self._sums[layer.name, name] = moments
                ops.symmetrize_(moments.gram)
                yield ExpertEvidence(own, moments)

        base = affine(self._problem.base_part)
        shifted = shift is not None or norm is not None
        fitted = self._fit(LayerEvidence(layer, base, shifted, norm is not None, experts()))
        if fitted is None:
            return
        merged = base.with_matrices(*fitted)
        self._store(layer, merged.weight - flow.offset)
        if shift:
            self._store(shift, merged.shift)
        if norm is not None:  # its factor stays; without a bias before it, the shift goes into its own
            held = norm.running_mean if shift else norm.running_mean + merged.shift
            self._store(flow.norm, scale * (norm.running_var + norm.eps).sqrt())
            self._store(self._shifts[flow.norm.name], summand + scale * held)
            self._solved_norms.add(flow.norm.name)

    def _lacking(self, layer: Layer, place: int, scale: Tensor | float) -> Tensor | None:
        """What the residual connection around ``layer`` carries less of in the merged model than in the expert's, for
        batch number ``place``, before the factor ``scale`` of a BatchNorm; None where it carries nothing."""
        if layer.name not in self._skips or self._skips[layer.name][place] is None:
            return None
        own, now = self._skips[layer.name][place]
        lacking = own - now
        if isinstance(self._merged.get_submodule(layer.module), CHANNEL_NORMS):
            lacking = lacking.movedim(1, -1)
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, *[1] * (lacking.dim() - 2 if layer.kind == "conv" else 0))
        return lacking / scale

    def _average_rows(self, layer: Layer, calls: list[_Call]) -> None:
        base, task_vectors = self._problem.base_part(layer), torch.stack(self._problem.task_vectors(layer))
        counts = self._counts.setdefault(layer.name, base.new_zeros(task_vectors.shape[:2], dtype=torch.float64))
        for call in calls:
            if call.now:
                rows = call.now.features()
                weight = call.now.token_weight(call.mask, rows.shape)
                weight = None if weight is None else weight.flatten().double()
                seen = torch.bincount(rows.flatten(), weight, minlength=len(base))
                counts[list(self._problem.experts).index(call.expert)] += seen
        weights = counts.to(base)
        weighted = (weights.unsqueeze(-1) * task_vectors).sum(0)
        self._store(layer, base + ops.diagonal_solve(weights.sum(0), weighted, task_vectors.mean(0)))

    def _store(self, layer: Layer, merged: Tensor) -> None:
        self._problem.store(self._parameters, layer, self._problem.base_part(layer), merged)


@dataclass(frozen=True)
class _Call:
    """One batch at one layer: what the expert whose batch it is sees there, and what the merged model does; None where
    the pass does not call the layer."""

    expert: str
    batch: Batch
    own: Observation | None
    now: Observation | None

    @property
    def mask(self) -> Tensor | None:
        return self.batch.get("attention_mask") if isinstance(self.batch, Mapping) else None

    def inputs(self) -> tuple[Tensor, Tensor] | None:
        """The expert's input and the merged model's, or None where they are not of the same rows."""
        if self.own and self.now and self.own.input.shape == self.now.input.shape:
            return self.own.input, self.now.input
        return None


def _add(moments: Moments, call: _Call, own: Affine, lacking: Tensor | None, feature_mix: float) -> None:
    """Add the rows of one batch. Where expert and merged model do not see the same rows (a mixture of experts sends
    tokens elsewhere), what the expert makes of the merged model's is the target."""
    x = call.now.features().to(own.weight.dtype)
    own_x = call.own.features().to(x) if call.inputs() else x
    geometry = call.now.view if own.layer.kind == "conv" else None
    y = own(own_x, geometry)
    if lacking is not None:
        y += lacking
    if feature_mix:
        x = torch.lerp(x, own_x, feature_mix)
    if own.layer.kind == "conv":
        moments.add_patches(x, y, geometry)
    elif own.layer.kind == "scale":
        tokens = x.shape[: x.dim() - own.weight.dim()]
        moments.add_channels(x, y, call.now.token_weight(call.mask, tokens))
    else:
        moments.add_rows(x, y, call.now.token_weight(call.mask, x.shape[:-1]))


def _with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` around the tensors of ``state``, which are not copied where dtype and device agree."""
    model = sharing_copy(model)
    tensors = {key: state[key].to(like) if key in state else like for key, like in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model


def _one_sample(batch: Batch) -> Batch:
    return batch[:1] if isinstance(batch, Tensor) else {key: tensor[:1] for key, tensor in batch.items()}
