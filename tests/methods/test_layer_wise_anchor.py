"""Layer-wise anchor merging against its schedule written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from statsmerge_ext.errors import MethodError
from tests.closed_forms import make_experts


@pytest.fixture
def base():
    """A small segmentation network: five modules with parameters, the last of them its head."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(backbone, nn.Conv2d(4, 2, 1)).eval()


DEPTHS = {"0.0": 0.0, "0.1": 0.25, "0.2": 0.5, "0.3": 0.75, "1": 1.0}


def expected(experts, lean, anchor):
    """Every parameter by the schedule ``lean`` of its depth."""
    states = {name: expert.state_dict() for name, expert in experts.items()}
    merged = {}
    for name, _ in next(iter(experts.values())).named_parameters():
        rho = lean(DEPTHS[name.rpartition(".")[0]], name)
        mean = sum(state[name] for state in states.values()) / len(states)
        merged[name] = (1 - rho) * mean + rho * states[anchor][name]
    return merged


@pytest.mark.parametrize(
    ("options", "lean", "anchor"),
    [
        ({}, lambda d, _: d, "a"),
        ({"anchor": "b"}, lambda d, _: d, "b"),
        ({"anchor": "c", "start": 0.5}, lambda d, _: max(0.0, d - 0.5) / 0.5, "c"),
        ({"ramp": "cosine"}, lambda d, _: (1 - math.cos(math.pi * d)) / 2, "a"),
        (
            {"anchor_parameters": ["0.1.", "0.0.bias"]},
            lambda d, name: 1.0 if name[:4] == "0.1." or name == "0.0.bias" else d,
            "a",
        ),
    ],
)
def test_the_schedule(base, options, lean, anchor):
    experts = make_experts(base)
    result = merge("layer_wise_anchor", base=base, experts=experts, **options)
    for name, tensor in expected(experts, lean, anchor).items():
        torch.testing.assert_close(result.state[name], tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        result.coefficients["values"].sum(1), torch.ones(len(result.coefficients["names"]), dtype=torch.float64)
    )


def test_the_head_is_the_anchors_own(base):
    experts = make_experts(base)
    result = merge("layer_wise_anchor", base=base, experts=experts, anchor="b")
    torch.testing.assert_close(result.model[1].weight, experts["b"][1].weight)
    assert result.model(torch.randn(2, 3, 8, 8)).shape == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "aa"}, "anchor: expected one of .* got 'aa' .did you mean 'a'"),
        ({"ramp": "square"}, "ramp: expected one of"),
        ({"start": 1.0}, "start: expected a depth in"),
        ({"anchor_parameters": ["decode_head"]}, "anchor_parameters: no parameter's name holds 'decode_head'"),
    ],
)
def test_bad_settings(base, options, message):
    with pytest.raises(MethodError, match=message):
        merge("layer_wise_anchor", base=base, experts=make_experts(base), **options)
