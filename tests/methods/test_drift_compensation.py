"""Drift compensation against a naive float64 implementation: a forward sweep a layer, least squares on raw rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import merge
from tests.closed_forms import make_experts, relative_error
from tests.execution_order import (
    LAYERS,
    OPTIONS,
    SKIPS,
    Encoder,
    ResidualBlock,
    compensate,
    inputs,
    randomise_statistics,
    reference,
    solve,
)

TOLERANCE = 1e-4


def check(base, data, order, norms={}, skips={}):
    base.eval()
    experts = make_experts(base)
    merged = compensate(base, experts, data).model
    expected = reference(copy.deepcopy(base), copy.deepcopy(experts), data, order, norms, skips, **OPTIONS)
    mean = merge("linear", base=base, experts=experts).model
    for x in data.values():
        exact = expected(x.double())
        assert relative_error(merged(x), exact) <= TOLERANCE
        assert relative_error(mean(x), exact) > 0.02  # the comparison can fail
    return merged


def test_convolutional_network():
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 5),
    )
    check(base, inputs(7, 3, 8, 8), ["0", "2", "4", "7"])


@pytest.mark.parametrize("bias", [False, True])
def test_residual_network_with_frozen_batch_norms(bias):
    torch.manual_seed(0)
    base = randomise_statistics(nn.Sequential(ResidualBlock(bias), ResidualBlock(bias)))
    pairs = (("expand", "norm0"), ("depthwise", "norm1"), ("project", "norm2"))
    norms = {f"{i}.{conv}": f"{i}.{norm}" for i in (0, 1) for conv, norm in pairs}
    skips = {f"{i}.project": f"{i}.expand" for i in (0, 1)}
    check(base, inputs(6, 4, 5, 5), list(norms), norms, skips)


def test_batch_norms_that_follow_no_layer():
    torch.manual_seed(0)
    base = randomise_statistics(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)))
    check(base, inputs(6, 4, 5, 5), ["0", "1", "3"])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 7), nn.Linear(6, 5, bias=False), nn.Linear(12, 4)
        self.gate = nn.Linear(6, 4)

    def forward(self, x):
        joined = torch.cat([torch.tanh(self.one(x)), torch.relu(self.two(x))], -1)
        return self.out(joined) * torch.sigmoid(self.gate(x))


def test_branching_network():
    torch.manual_seed(0)
    check(Branching(), inputs(40, 6), ["one", "two", "out", "gate"])


def test_transformer():
    torch.manual_seed(0)
    base = nn.Sequential(Encoder(), Encoder())
    order = [f"{i}.{name}" for i in (0, 1) for name in LAYERS]
    skips = {f"{i}.{name}": f"{i}.{start}" for i in (0, 1) for name, start in SKIPS.items()}
    check(base, inputs(6, 5, 8), order, skips=skips)


def packed(encoder):
    """The same layer as torch's own, with its packed attention."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=F.gelu, batch_first=True, norm_first=True)
    state = encoder.state_dict()
    renamed = {
        "self_attn.out_proj": "attention.out",
        "norm1": "norm1",
        "norm2": "norm2",
        "linear1": "up",
        "linear2": "down",
    }
    layer.load_state_dict(
        {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in renamed.items() for kind in ("weight", "bias")}
        | {
            f"self_attn.in_proj_{kind}": torch.cat([state[f"attention.{name}.{kind}"] for name in "qkv"])
            for kind in ("weight", "bias")
        }
    )
    return layer.eval()


def test_packed_attention_is_what_it_is_written_out():
    torch.manual_seed(0)
    base, data = Encoder().eval(), inputs(6, 5, 8)
    experts = make_experts(base)
    plain = compensate(base, experts, data).model
    merged = compensate(packed(base), {name: packed(e) for name, e in experts.items()}, data).model
    expected = packed(plain).state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


def test_a_shared_module_is_solved_from_all_its_calls():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), shared, nn.Tanh(), shared).eval()
    experts, data = make_experts(base), inputs(30, 6)
    merged = compensate(base, experts, data).model
    assert merged[2] is merged[4]

    # At the first call only its own rows are known, at the second those of both.
    class FirstCall(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    doubled = copy.deepcopy(base).double(), {k: copy.deepcopy(e).double() for k, e in experts.items()}
    once = reference(FirstCall(*doubled[0]), {k: FirstCall(*e) for k, e in doubled[1].items()}, data, ["0", "2"])
    expected = nn.Sequential(*once)
    with torch.no_grad():
        solve(expected, *doubled, data, "2", {}, {}, *OPTIONS.values())
    for x in data.values():
        assert relative_error(merged(x), expected(x.double())) <= TOLERANCE
