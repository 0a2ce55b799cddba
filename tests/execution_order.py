"""Drift compensation, ours and naively: a forward sweep a layer in float64, least squares on raw rows.

In the naive one ``order`` names the modules in execution order; ``norms`` says which BatchNorm follows a module,
``skips`` the module whose input is added to a module's output, ``others`` what other methods have made of parameters.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import merge
from tests.closed_forms import grouped_patches

OPTIONS = {"scaling_factor": 1.15, "ridge": 0.4, "drift_ridge": 0.9}


def compensate(base, experts, data, **options):
    calibration = {name: [x[:3], x[3:]] for name, x in data.items()}
    return merge("drift_compensation", base=base, experts=experts, calibration=calibration, **{**OPTIONS, **options})


def inputs(*shape):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(*shape, generator=generator) for name in ("a", "b", "c")}


def randomise_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


class ResidualBlock(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.expand, self.norm0 = nn.Conv2d(4, 10, 1, bias=bias), nn.BatchNorm2d(10)
        self.depthwise, self.norm1 = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=bias), nn.BatchNorm2d(10)
        self.project, self.norm2 = nn.Conv2d(10, 4, 1, bias=bias), nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu6(self.norm0(self.expand(x)))
        y = F.relu6(self.norm1(self.depthwise(y)))
        return x + self.norm2(self.project(y))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A pre-norm transformer layer, written out."""

    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


LAYERS = ("norm1", *(f"attention.{name}" for name in ("q", "k", "v", "out")), "norm2", "up", "down")
SKIPS = {"attention.out": "norm1", "down": "norm2"}


def reference(
    base, experts, data, order, norms={}, skips={}, scaling_factor=1.15, ridge=0.4, drift_ridge=0.9, others={}
):
    base, experts = base.double().eval(), {name: e.double().eval() for name, e in experts.items()}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for key, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                mean = torch.stack([e.state_dict()[key] for e in experts.values()]).mean(0)
                tensor.copy_(others.get(key, mean))
        for path in order:
            solve(merged, base, experts, data, path, norms, skips, scaling_factor, ridge, drift_ridge, others)
    return merged


def solve(merged, base, experts, data, path, norms, skips, scaling_factor, ridge, drift_ridge, others={}):
    module, start = merged.get_submodule(path), base.get_submodule(path)
    is_scale = isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
    norm = norms.get(path)
    has_bias = module.bias is not None and f"{path}.bias" not in others
    shifted = has_bias or norm is not None
    fixed = 0 if module.bias is None or has_bias else module.bias
    rows, linear, targets = [], [], []
    for name, expert in experts.items():
        of_expert, of_merged = seen(expert, data[name].double()), seen(merged, data[name].double())
        for own_x, x in zip(of_expert[path], of_merged[path], strict=True):
            own = expert.get_submodule(path)
            wanted, on_merged = own(own_x), own(x)
            if norm:
                wanted, on_merged = (expert.get_submodule(norm)(y) for y in (wanted, on_merged))
            if path in skips:
                (carried,), (now,) = of_expert[skips[path]], of_merged[skips[path]]
                wanted = wanted + carried - now
            if norm:
                wanted, on_merged = (undone(merged.get_submodule(norm), y) for y in (wanted, on_merged))
            rows.append(features(module, x))
            targets.append(as_rows(module, wanted) - fixed)
            linear.append(as_rows(module, on_merged) - fixed)
    groups = getattr(module, "groups", 1)
    weight = start.weight.clone()
    if is_scale:
        parts = [([x[:, [c]] for x in rows], [c]) for c in range(len(weight))]
    else:
        outputs = list(torch.arange(len(weight)).chunk(groups))
        parts = [([x[g] for x in rows], outputs[g]) for g in range(groups)]
    shifts = torch.zeros(len(weight), dtype=torch.float64)
    for x, channels in parts:
        first = start.weight[channels].flatten(1) if not is_scale else start.weight[channels].reshape(1, 1)
        x, y, z = torch.cat(x), torch.cat(targets)[:, channels], torch.cat(linear)[:, channels]
        held = first.clone()
        for expert in experts.values():
            own = expert.get_submodule(path).weight[channels].reshape(first.shape)
            if norm:  # its factors are a part of what the expert's layer is
                own = own * (factors(expert, norm) / factors(merged, norm))[channels].unsqueeze(1)
            held += 3 * (own - first)
        anchor = least_squares(x, z, held, ridge, shifted)
        fitted = least_squares(x, y, anchor, drift_ridge, shifted)
        if not is_scale:
            fitted = first + scaling_factor * (fitted - first)
        if norm:
            fitted = torch.stack([gain(x @ row, y[:, i], drift_ridge) * row for i, row in enumerate(fitted)])
        weight[channels] = fitted.reshape(weight[channels].shape)
        shifts[channels] = (y - x @ fitted.T).mean(0)
    module.weight.copy_(weight)
    if has_bias:
        module.bias.copy_(shifts)
    if norm:
        after = merged.get_submodule(norm)
        after.bias += after.weight * (shifts - (shifts if has_bias else 0)) / (after.running_var + after.eps).sqrt()


def factors(model, path):
    """What the BatchNorm at ``path`` multiplies its inputs by."""
    norm = model.get_submodule(path)
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def gain(x, y, ridge):
    """min (g x + b − y)² + ridge · x's square · (g − 1)²."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y + ridge * x @ x) / ((1 + ridge) * x @ x) if x.any() else torch.ones(())  # a channel may be dead


def seen(model, x):
    """Path -> the inputs of that module's calls."""
    found = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, path=path: found.setdefault(path, []).append(args[0].clone()))
        for path, m in model.named_modules()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def features(module, x):
    if isinstance(module, nn.Conv2d):
        return grouped_patches(x, module)
    if isinstance(module, nn.Linear):
        return [x.flatten(0, -2)]
    plain = copy.deepcopy(module)
    plain.weight.fill_(1), plain.bias.fill_(0)
    return as_rows(module, plain(x))


def as_rows(module, y):
    return y.movedim(1, -1).flatten(0, -2) if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) else y.flatten(0, -2)


def undone(norm, y):
    """What the BatchNorm made ``y`` of."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return ((y.movedim(1, -1) - norm.bias) / scale + norm.running_mean).movedim(-1, 1)


def least_squares(x, y, anchor, ridge, shifted):
    """min ‖x Wᵀ + b − y‖² + ridge · mean eigenvalue · ‖W − anchor‖², by QR on stacked rows."""
    if shifted:
        x, y = x - x.mean(0), y - y.mean(0)
    root = (ridge * x.square().sum() / x.shape[1]).sqrt()
    x = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(x, torch.cat([y, root * anchor.T]), driver="gels").solution.T
