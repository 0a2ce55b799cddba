"""What happens at a layer when layers are merged in execution order, wherever the forward passes come from.

What each expert makes of its own input at a layer is set against the input that the merged model has there by now: a
method fits one to the other, so that the layer makes up for what all layers before it left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.calibration import Batch
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.affine import Affine, batch_norm_map, divisible, shifts_of
from statsmerge_ext.engine.dataflow import Flow, flows_among
from statsmerge_ext.engine.layer_evidence import ExpertEvidence, Fit, LayerEvidence
from statsmerge_ext.engine.lockstep import Step
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.shared_inputs import SharedInputs
from statsmerge_ext.engine.streaming import layer_shape
from statsmerge_ext.evidence.observe import Observation
from statsmerge_ext.layers import CHANNEL_NORMS, Layer

# Elements of a layer that are averaged at a time, and of one that are solved: a long table is not in memory several
# times over, and the Gram matrix of a wide layer, which is summed for each of its parts, is cheap beside the rest.
_AVERAGED, _SOLVED = 2**22, 2**25


class Passes:
    """Forward passes of the experts, and of the merged model on the same samples, that stop at the problem's layers.

    Args:
        batches: (expert, batch) of each pair of passes; of several processes, those of this one.
        merged: the merged model's modules.
        layers: all layers that the passes go through, those of other methods, too.
        flows: the surroundings of its layers.

    Attributes:
        parameters: key -> the merged model's parameters, which are replaced in place.
        changed: whether some expert differs from what the problem's base has of a layer that the passes have come to.
    """

    def __init__(
        self, batches: list[tuple[str, Batch]], merged: nn.Module, layers: list[Layer], flows: Mapping[str, Flow]
    ) -> None:
        self.batches, self.merged, self.layers, self.flows = batches, merged, layers, flows
        self.parameters: Mapping[str, Tensor] = dict(merged.named_parameters(remove_duplicate=False))
        self.changed = False

    def steps(self) -> Iterator[Step]:
        """Wherever the passes come to layers; arrivals are those of the experts' passes and then the merged model's."""
        raise NotImplementedError

    def present(self, place: int) -> AbstractContextManager:
        """A context in which what the pair of passes number ``place`` has seen is in memory."""
        return nullcontext()

    def rounded(self, key: str, merged: Tensor) -> Tensor:
        """Elements of a parameter as the merged model can hold them."""
        return merged


class LayerByLayer:
    """Merges each layer where all passes have come to it; arguments as of
    :func:`~statsmerge_ext.engine.sequential.merge_in_execution_order`."""

    def __init__(
        self, problem: MergeProblem, passes: Passes, fit: Fit, shifts: bool, surroundings: bool, feature_mix: float
    ) -> None:
        self._problem, self._passes, self._fit, self._feature_mix = problem, passes, fit, feature_mix
        self._own = {layer.name for layer in problem.layers}
        self._biases = shifts_of(passes.layers)
        self._shifts = shifts_of(problem.layers) if shifts else {}
        # Those that belong to other methods, of layers that are merged here.
        self._fixed = {name: self._biases[name] for name in self._biases if shifts and name not in self._shifts}
        self._flows = flows_among(passes.flows, problem.layers if shifts and surroundings else [])
        self._skips: dict[str, list] = {}  # layer -> what its residual connection carries, a pair a batch
        self._sums: dict[tuple[str, str], Moments] = {}  # of layers that are called again, and experts
        self._inputs: dict[str, SharedInputs] = {}  # of each expert, at the layer that was solved last
        self._counts: dict[str, Tensor] = {}  # of each embedding's rows, [K, rows]
        self._seen: set[str] = set()
        self._solved_norms: set[str] = set()  # together with the layers before them

    def run(self) -> Solution:
        """The merged layers of the problem. Raises what the forward passes raise, and ProcessError."""
        problem, parameters = self._problem, self._passes.parameters
        progress = tqdm(total=len(self._flows), desc="Merging", unit="layer", disable=not problem.progress)
        with torch.no_grad(), progress, closing(self._passes.steps()) as steps:
            for layer in self._passes.layers:
                for part in self._in_parts(layer, _AVERAGED):
                    base, mean = problem.base_part(part), torch.stack(problem.task_vectors(part)).mean(0)
                    self._store(part, base + mean if layer.name in self._own else base)
            for step in steps:
                for layer in step.layers:
                    self._arrive(layer, step)
                    progress.update()
        return Solution(
            {layer.parameter: parameters[layer.parameter].detach() for layer in problem.layers},
            notes={"never_called": [x.name for x in problem.layers if x.source and x.name not in self._seen]},
        )

    def _arrive(self, layer: Layer, step: Step) -> None:
        """All passes are about to call ``layer``: merge it, unless another method has, and put the result where they
        will find it."""
        half = len(self._passes.batches)
        calls = [
            _Call(place, name, batch, own, now)
            for place, ((name, batch), own, now) in enumerate(
                zip(self._passes.batches, step.arrivals[:half], step.arrivals[half:], strict=True)
            )
        ]
        if not any(processes.of_all(any(call.now for call in calls))):
            return
        self._seen.add(layer.name)
        for name, flow in self._flows.items():
            if flow.skip == layer.name:
                self._skips[name] = [call.inputs() for call in calls]
        parts = [part for part in (layer, self._biases.get(layer.name)) if part]
        passes = self._passes
        passes.changed = passes.changed or any(
            bool(t.any()) for part in parts for t in self._problem.task_vectors(part)
        )
        to_merge = passes.changed and layer.name in self._own
        if to_merge and layer.kind == "embedding":
            self._average_rows(layer, calls)
        elif to_merge and layer.name not in self._solved_norms:
            can_be_cut = layer.kind == "linear" and not layer.transposed
            for part in self._in_parts(layer, _SOLVED) if can_be_cut else (layer,):
                self._solve(layer, part, calls)
        self._skips.pop(layer.name, None)

    def _solve(self, whole: Layer, layer: Layer, calls: list[_Call]) -> None:
        """Solve ``layer``, some or all rows of ``whole``."""
        flow = self._flows.get(whole.name, Flow())
        shift, fixed = (
            found and replace(found, rows=layer.rows)
            for found in (self._shifts.get(whole.name), self._fixed.get(whole.name))
        )
        norm = flow.norm and self._passes.merged.get_submodule(flow.norm.module)
        if norm is not None:
            scale, summand = batch_norm_map(norm, "", norm.state_dict())
            scale = divisible(scale)

        def affine(part: Callable[[Layer], Tensor], bias: Layer | None) -> Affine:
            return Affine(layer, part(layer) + flow.offset, bias and part(bias))

        def experts() -> Iterator[ExpertEvidence]:
            for name, state in self._problem.experts.items():
                own = affine(lambda part, name=name: self._problem.expert_part(part, name), shift or fixed)
                if norm is not None:
                    own_scale, own_summand = batch_norm_map(norm, flow.norm.module, state)
                    own = own.then(own_scale / scale, (own_summand - summand) / scale)
                if fixed:  # the merged model has it already
                    own = replace(own, shift=own.shift - fixed.part(self._passes.parameters[fixed.parameter]))
                moments = self._moments(whole, own, name, calls, 1 if norm is None else scale)
                yield ExpertEvidence(own, moments)

        base = affine(self._problem.base_part, shift)
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

    def _moments(self, whole: Layer, own: Affine, expert: str, calls: list[_Call], scale: Tensor | float) -> Moments:
        """Those of an expert whose map is ``own``, for the same rows of ``whole``; ``scale`` as of :meth:`_lacking`."""
        layer, called = own.layer, self._flows.get(whole.name, Flow()).calls
        calls = [call for call in calls if call.expert == expert and call.now]
        if layer.kind == "linear" and whole.name not in self._skips and called <= 1:
            shared, pairs = self._inputs.setdefault(expert, SharedInputs()), [(call.own, call.now) for call in calls]
            if shared.are_worth_summing(pairs, own.matrices):
                return shared.moments(pairs, self._rows(calls, own.weight.dtype), own.matrices, own.shift)
        self._inputs.clear()
        moments = self._sums.pop((layer.name, expert), None) or Moments.zeros_like(own.matrices)
        for call in calls:
            with self._passes.present(call.place):
                _add(moments, call, own, self._lacking(whole, layer, call.place, scale), self._feature_mix)
        if called > 1:
            self._sums[layer.name, expert] = moments
            moments = moments.scaled(1)
        moments.add_up_()
        ops.symmetrize_(moments.gram)
        return moments

    def _rows(self, calls: list[_Call], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The merged model's inputs, the expert's, and factors of their rows, batch by batch."""
        for call in calls:
            with self._passes.present(call.place):
                x, own_x = _features(call, dtype, self._feature_mix)
                yield x, own_x, call.now.token_weight(call.mask, x.shape[:-1])

    def _lacking(self, whole: Layer, layer: Layer, place: int, scale: Tensor | float) -> Tensor | None:
        """What the residual connection around ``whole`` carries less of in the merged model than in the expert's, for
        the rows of ``layer`` and batch number ``place``, before the factor ``scale`` of a BatchNorm; None where it
        carries nothing."""
        if whole.name not in self._skips or self._skips[whole.name][place] is None:
            return None
        own, now = self._skips[whole.name][place]
        rows = _rows_within(whole, layer)
        if rows != slice(None):
            own, now = own[..., rows], now[..., rows]
        lacking = own - now
        if isinstance(self._passes.merged.get_submodule(layer.module), CHANNEL_NORMS):
            lacking = lacking.movedim(1, -1)
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, *[1] * (lacking.dim() - 2 if layer.kind == "conv" else 0))
        return lacking / scale

    def _average_rows(self, layer: Layer, calls: list[_Call]) -> None:
        experts, length = list(self._problem.experts), layer_shape(self._problem.base, layer)[0]
        counts = self._passes.parameters[layer.parameter].new_zeros(len(experts), length, dtype=torch.float64)
        for call in calls:
            if call.now:
                rows = call.now.features()
                weight = call.now.token_weight(call.mask, rows.shape)
                weight = None if weight is None else weight.flatten().double()
                counts[experts.index(call.expert)] += torch.bincount(rows.flatten(), weight, minlength=length)
        counts = self._counts.get(layer.name, 0) + processes.add_up_(counts)
        self._counts[layer.name] = counts
        for part in self._in_parts(layer, _AVERAGED):
            base, task_vectors = self._problem.base_part(part), torch.stack(self._problem.task_vectors(part))
            weights = counts[:, _rows_within(layer, part)].to(base)
            weighted = (weights.unsqueeze(-1) * task_vectors).sum(0)
            self._store(part, base + ops.diagonal_solve(weights.sum(0), weighted, task_vectors.mean(0)))

    def _in_parts(self, layer: Layer, elements: int) -> Iterator[Layer]:
        return layer.in_rows(layer_shape(self._problem.base, layer), elements)

    def _store(self, layer: Layer, merged: Tensor) -> None:
        merged = self._passes.rounded(layer.parameter, merged)
        self._problem.store(self._passes.parameters, layer, self._problem.base_part(layer), merged)


@dataclass(frozen=True)
class _Call:
    """One batch at one layer: what the expert whose batch it is sees there, and what the merged model does; None where
    the pass does not call the layer."""

    place: int
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


def _rows_within(whole: Layer, part: Layer) -> slice:
    """Which of the rows of ``whole`` those of ``part`` are."""
    if part.rows == whole.rows:
        return slice(None)
    first = whole.rows[0] if whole.rows else 0
    return slice(part.rows[0] - first, part.rows[1] - first)


def _features(call: _Call, dtype: torch.dtype, feature_mix: float) -> tuple[Tensor, Tensor]:
    """What is fitted of one batch, and what the expert makes its targets of. Where expert and merged model do not see
    the same rows (a mixture of experts sends tokens elsewhere), both are the merged model's."""
    x = call.now.features().to(dtype)
    own_x = call.own.features().to(x) if call.inputs() else x
    return torch.lerp(x, own_x, feature_mix) if feature_mix else x, own_x


def _add(moments: Moments, call: _Call, own: Affine, lacking: Tensor | None, feature_mix: float) -> None:
    """Add the rows of one batch."""
    x, own_x = _features(call, own.weight.dtype, feature_mix)
    geometry = call.now.view if own.layer.kind == "conv" else None
    y = own(own_x, geometry)
    if lacking is not None:
        y += lacking
    if own.layer.kind == "conv":
        moments.add_patches(x, y, geometry)
    elif own.layer.kind == "scale":
        tokens = x.shape[: x.dim() - own.weight.dim()]
        moments.add_channels(x, y, call.now.token_weight(call.mask, tokens))
    else:
        moments.add_rows(x, y, call.now.token_weight(call.mask, x.shape[:-1]))
