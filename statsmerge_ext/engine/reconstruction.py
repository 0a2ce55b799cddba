"""Layers solved in execution order, on what the merged model itself feeds them.

The experts' forward passes and those of the merged model go through the layers in lockstep. At each layer what the
experts make of their own inputs is regressed on the inputs that the merged model has there by now, so that the layer
makes up for what all layers before it left over; its weights are replaced, and the passes go on. Each layer runs once
for every expert and once for the merged model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.dataflow import Flow, trace_dataflow
from statsmerge_ext.engine.lockstep import Step, lockstep
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.together import groups, join
from statsmerge_ext.evidence.observe import Geometry, Observation
from statsmerge_ext.layers import Layer

#: Batches are run together up to so many samples.
_SAMPLES_TOGETHER = 64
# The scale of a norm is divided by; one this much smaller than the others counts as this much.
_LEAST_SCALE = 0.02


class Reconstruction:
    """One merge in execution order.

    Args:
        problem: models and batches; its ``model`` becomes the merged one.
        ridge: of the fit to what the experts' layers make of the merged model's inputs.
        drift_ridge: of the fit to what the experts' layers make of their own inputs, anchored at the former. Both are
            parts of the mean eigenvalue of the inputs' Gram matrix.
    """

    def __init__(self, problem: MergeProblem, *, ridge: float, drift_ridge: float, scale: float = 1.0, fuse=True, skip=True) -> None:
        self.problem = problem
        self.ridge, self.drift_ridge = ridge, drift_ridge
        self.scale = scale
        self.fuse, self.skip = fuse, skip
        self.shifts = _shifts(problem.layers)
        self.batches = [
            (name, join([batches[place] for place in places]))
            for name, batches in problem.batches.items()
            for places in groups(batches, _SAMPLES_TOGETHER)
        ]
        self.flows: dict[str, Flow] = {}
        self.skips: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.sums: dict[str, dict[str, Moments]] = {}
        self.residuals: dict[str, float] = {}
        self.changed = False

    def run(self) -> Solution:
        """Merge all layers. Raises what the forward passes raise."""
        problem = self.problem
        start = problem.map_layers(lambda layer, base, task_vectors: base + torch.stack(task_vectors).mean(0))
        self.buffers = merge_buffers(problem, start.parameters, reestimate=False)
        merged = problem.model.eval()
        experts = {name: _with_state(merged, state) for name, state in problem.experts.items()}
        merged.load_state_dict({**self.buffers, **start.parameters}, strict=False)
        self.parameters = dict(merged.named_parameters(remove_duplicate=False))
        self.flows = trace_dataflow(merged, problem.layers, problem.forward, _one_sample(self.batches[0][1]))

        passes = [(model, batch) for own in (True, False) for name, batch in self.batches for model in [experts[name] if own else merged]]
        progress = tqdm(total=len(self.flows), desc="Merging", unit="layer", disable=not problem.progress)
        with torch.no_grad(), progress, closing(lockstep(passes, problem.layers, problem.forward)) as steps:
            for step in steps:
                for layer in step.layers:
                    self.arrive(layer, step)
                    progress.update()
        names = {layer.parameter for layer in problem.layers}
        unseen = [layer.name for layer in problem.layers if layer.source and layer.name not in self.flows]
        return Solution(
            {name: self.parameters[name].detach() for name in names},
            notes={"residuals": self.residuals, "never_called": unseen},
        )

    def arrive(self, layer: Layer, step: Step) -> None:
        """The passes wait before ``layer``: solve it."""
        pairs = list(zip(step.arrivals[: len(self.batches)], step.arrivals[len(self.batches) :], strict=True))
        for name, flow in self.flows.items():
            if flow.skip == layer.name:
                self.skips[name] = [(own.input, now.input) if own and now else None for own, now in pairs]
        base, vectors = self.problem.base_part(layer), self.problem.task_vectors(layer)
        shift = self.shifts.get(layer.name)
        shift_vectors = self.problem.task_vectors(shift) if shift else vectors
        self.changed |= any(bool(vector.any()) for vector in (*vectors, *shift_vectors))
        if not self.changed:
            return
        if layer.kind == "embedding":
            return
        flow = self.flows[layer.name]
        norm = flow.norm if self.fuse else None
        mean = torch.stack(vectors).mean(0)
        anchor = base + mean
        here = here_shift = None
        if norm is not None:
            here, here_shift = self.norm_affine(norm, None)
        total = first = None
        for place, name in enumerate(self.problem.experts):
            weight = base + vectors[place]
            bias = self.problem.base_part(shift) + shift_vectors[place] if shift else None
            factor = offset = None
            if norm is not None:
                a, c = self.norm_affine(norm, name)
                factor, offset = a / here, (c - here_shift) / here
            moments = Moments.zeros_like(_matrices(layer, anchor))
            for number, ((task, batch), (own, now)) in enumerate(zip(self.batches, pairs, strict=True)):
                if task != name or now is None:
                    continue
                x = now.features().to(base.dtype)
                mine = own.features().to(base.dtype) if own else x
                mine = mine if mine.shape == x.shape else x
                y = _apply(layer, mine, weight, bias, now.view)
                if factor is not None:
                    y = y * _channels(factor, y, layer) + _channels(offset, y, layer)
                if self.skip and flow.skip and self.skips[layer.name][number]:
                    s_own, s_now = self.skips[layer.name][number]
                    d = s_own - s_now
                    if here is not None:
                        d = d / _channels(here, y, layer)
                    elif layer.kind == "scale" and isinstance(self.problem.model.get_submodule(layer.module), nn.modules.batchnorm._BatchNorm):
                        d = d.movedim(1, -1)
                    y = y + d
                if layer.kind == "conv":
                    moments.add_patches(x, y, now.view)
                elif layer.kind == "scale":
                    moments.add_channels(x, y, _token_weight(batch, x.shape[: x.dim() - base.dim()], now.tokens_first))
                else:
                    moments.add_rows(x, y, _token_weight(batch, x.shape[:-1], now.tokens_first))
            ops.symmetrize_(moments.gram)
            w, b = weight, bias
            if factor is not None:
                w = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
                b = (0 if bias is None else bias * factor) + offset
            one = moments.with_targets(_matrices(layer, w), b)
            if total is None:
                total, first = moments, one
            else:
                total.add(moments)
                first.product += one.product
                first.outputs += one.outputs
        first.gram, first.inputs, first.count = total.gram, total.inputs, total.count
        self.skips.pop(layer.name, None)
        shifted = bool(shift) or norm is not None
        prior, _ = first.fit(_matrices(layer, anchor), self.ridge, shifted=shifted)
        fitted, fitted_shift = total.fit(prior, self.drift_ridge, shifted=shifted)
        if self.scale != 1 and layer.kind != "scale":
            bm = _matrices(layer, base).double()
            fitted = bm + self.scale * (fitted - bm)
            if fitted_shift is not None:
                fitted_shift = (total.outputs - (fitted @ total.inputs.unsqueeze(-1)).squeeze(-1)) / total.count
        self.residuals[layer.name] = total.residual(fitted, fitted_shift)
        self.problem.store(self.parameters, layer, base, _from_matrices(layer, fitted, base.shape).to(base.dtype))
        if shift:
            part = self.problem.base_part(shift)
            self.problem.store(self.parameters, shift, part, fitted_shift.reshape(part.shape).to(part.dtype))

    def norm_affine(self, norm, name):
        path = norm.module + "." if norm.module else ""
        state = self.problem.experts[name] if name else {**self.buffers, **self.parameters}
        get = lambda key: state[path + key].detach().float()
        a = get("weight") * (get("running_var") + self.problem.model.get_submodule(norm.module).eps).rsqrt()
        c = get("bias") - a * get("running_mean")
        if name is None:
            least = _LEAST_SCALE * a.abs().mean()
            a = torch.where(a.abs() < least, least, a)
            c = get("bias") - a * get("running_mean")
        return a, c


def _channels(v, y, layer):
    return v.reshape(-1, *[1] * (y.dim() - 2)) if layer.kind == "conv" else v


def _apply(layer, x, weight, shift, view):
    if layer.kind == "conv":
        x = F.pad(x, [side for pair in reversed(view.padding) for side in pair])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(view.kernel_size) - 1]
        return convolve(x, weight, shift, view.stride, 0, view.dilation, view.groups)
    if layer.kind == "scale":
        return x * weight if shift is None else torch.addcmul(shift, x, weight)
    return F.linear(x, layer.matrices(weight)[0], shift)


def _matrices(layer, part):
    return part.reshape(-1, 1, 1) if layer.kind == "scale" else layer.matrices(part)


def _from_matrices(layer, matrices, shape):
    return matrices.reshape(shape) if layer.kind == "scale" else layer.from_matrices(matrices, shape)


def _shifts(layers):
    biases = {l.parameter: l for l in layers if l.kind == "bias"}
    out = {}
    for l in layers:
        if l.kind in ("linear", "conv", "scale") and l.parameter.endswith("weight"):
            b = biases.get(l.parameter.removesuffix("weight") + "bias")
            if b:
                out[l.name] = replace(b, rows=l.rows)
    return out


def _with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict({k: state[k].to(v) if k in state else v for k, v in model.state_dict().items()}, assign=True)
    return model


def _one_sample(batch):
    return batch[:1] if isinstance(batch, Tensor) else {key: tensor[:1] for key, tensor in batch.items()}


def _token_weight(batch, tokens, tokens_first):
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    if tokens_first:
        mask = mask.T
    if tokens == mask.shape:
        return mask
    if tokens == (mask.shape[0] * mask.shape[1],):
        return mask.flatten()
    if tokens == (1, mask.shape[1]):
        return mask.sum(0, keepdim=True)
    return None
