"""Buffers: what a model keeps beside its parameters, above all the statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from statsmerge_ext.engine.problem import MergeProblem


def merge_buffers(problem: MergeProblem, merged: Mapping[str, Tensor], *, reestimate: bool) -> dict[str, Tensor]:
    """Every entry of the base's state dict that is not among the ``merged`` parameters.

    Floating-point buffers are averaged over the experts, others (counters, position indices) are the base's. With
    ``reestimate`` the statistics of BatchNorm are those of the merged model on all tasks' calibration batches.
    """
    buffers = {key: problem.base[key].detach().clone() for key in problem.base if key not in merged}
    for key, value in buffers.items():
        if value.is_floating_point():
            compute = value if value.dtype == torch.float64 else value.float()
            change = torch.stack([state[key].detach().to(compute) - compute for state in problem.experts.values()])
            change = change.mean(0)
            buffers[key] = torch.where(change == 0, value, (compute + change).to(value.dtype))
    if reestimate:
        buffers.update(_reestimated(problem, {**merged, **buffers}))
    return buffers


def _reestimated(problem: MergeProblem, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    model = problem.model
    model.load_state_dict(state)
    model.eval()
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    momenta = {path: norm.momentum for path, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average over all batches
        norm.train()
    with torch.no_grad():
        for batches in problem.batches.values():
            for batch in batches:
                problem.forward(model, batch)
    for path, norm in norms.items():
        norm.momentum = momenta[path]
        norm.eval()
    return {
        f"{path}.{name}": b.clone() for path, norm in norms.items() for name, b in norm.named_buffers(recurse=False)
    }
