"""FeatCal against a float64 sweep a layer, written out from means and covariances."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from tests.closed_forms import make_experts, relative_error
from tests.execution_order import features, seen

RIDGE, MIX, ANCHOR = 0.07, 0.3, 0.5
OPTIONS = {"ridge": RIDGE, "feature_mix": MIX, "anchor_scale": ANCHOR}


def reference(base, experts, data, order):
    base, experts = base.double(), {name: expert.double() for name, expert in experts.items()}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for key, tensor in merged.state_dict().items():
            tensor.copy_(torch.stack([e.state_dict()[key] for e in experts.values()]).mean(0))
        for path in order:
            module = merged.get_submodule(path)
            rows = []
            for name, expert in experts.items():
                own, now = (seen(model, data[name].double())[path][0] for model in (expert, merged))
                rows.append([features(module, now), features(module, own), expert.get_submodule(path)])
            anchors = {
                key: start + ANCHOR * sum(e.get_submodule(path).get_parameter(key) - start for e in experts.values())
                for key, start in base.get_submodule(path).named_parameters()
            }
            (calibrate_norm if isinstance(module, nn.LayerNorm) else calibrate)(module, rows, anchors)
    return merged


def calibrate_norm(module, rows, anchors):
    for channel in range(len(module.weight)):
        matrix, target = RIDGE * torch.eye(2).double(), RIDGE * torch.stack([a[channel] for a in anchors.values()])
        for now, _, own in rows:
            design = torch.stack([now[:, channel], torch.ones(len(now)).double()], 1)
            wanted = design @ torch.stack([own.weight[channel], own.bias[channel]])
            matrix, target = matrix + design.T @ design / len(now), target + design.T @ wanted / len(now)
        module.weight[channel], module.bias[channel] = torch.linalg.solve(matrix, target)


def calibrate(module, rows, anchors):
    groups = getattr(module, "groups", 1)
    for group, outputs in enumerate(torch.arange(len(module.weight)).chunk(groups)):
        gram = cross = mass = residual = 0.0
        parts = []
        for now, own_rows, own in rows:
            x, mixed = now[group], MIX * own_rows[group] + (1 - MIX) * now[group]
            part = 1 / (x.T @ x / len(x)).norm() / len(x)
            weight = own.weight[outputs].flatten(1)
            gram, cross = gram + part * x.T @ x, cross + part * weight @ mixed.T @ x
            parts.append((x, mixed, part * len(x), weight, own))
        anchor = anchors["weight"][outputs].flatten(1)
        identity = torch.eye(len(gram), dtype=torch.float64)
        merged = (cross + RIDGE * anchor) @ torch.linalg.inv(gram + RIDGE * identity)
        module.weight[outputs] = merged.reshape(module.weight[outputs].shape)
        if module.bias is not None:
            for x, mixed, part, weight, own in parts:
                mass += part
                residual += part * (own.bias[outputs] + weight @ mixed.mean(0) - merged @ x.mean(0))
            module.bias[outputs] = (residual + RIDGE * anchors["bias"][outputs]) / (mass + RIDGE)


def calibrated(base, experts, data, **options):
    calibration = {name: [x[:3], x[3:]] for name, x in data.items()}
    return merge("featcal", base=base, experts=experts, calibration=calibration, **{**OPTIONS, **options}).model


MODELS = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Linear(5, 3)
        ),
        (40, 6),
        ["0", "1", "3", "4"],
    ),
    "convolutional": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, stride=2, padding=1)),
        (7, 3, 8, 8),
        ["0", "2"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_against_a_sweep_a_layer(name):
    torch.manual_seed(0)
    model, shape, order = MODELS[name]
    base = model().eval()
    experts = make_experts(base)
    data = {key: torch.randn(*shape, generator=torch.Generator().manual_seed(k)) for k, key in enumerate(experts)}
    merged = calibrated(base, experts, data)
    expected = reference(copy.deepcopy(base), copy.deepcopy(experts), data, order)
    mean = merge("linear", base=base, experts=experts).model
    for x in data.values():
        assert relative_error(merged(x), expected(x.double())) <= 1e-4
        assert relative_error(mean(x), expected(x.double())) > 0.02  # the comparison can fail


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"feature_mix": 1.5}], ids=str)
def test_bad_numbers_are_refused(options):
    base = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected a number"):
        calibrated(base, make_experts(base), {name: torch.randn(9, 3) for name in "abc"}, **options)
