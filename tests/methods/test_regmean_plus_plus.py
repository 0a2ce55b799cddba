"""RegMean++ against a float64 sweep a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from tests.closed_forms import make_experts, relative_error


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_against_a_sweep_a_layer(alpha):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    base.eval()
    experts = make_experts(base)
    data = {name: torch.randn(40, 6, generator=torch.Generator().manual_seed(k)) for k, name in enumerate(experts)}
    ours = merge(
        "regmean_plus_plus",
        base=base,
        experts=experts,
        calibration={name: [x[:9], x[9:]] for name, x in data.items()},
        reduce_non_diagonal_ratio=alpha,
    ).model
    merged = copy.deepcopy(merge("linear", base=base, experts=experts).model).double()
    with torch.no_grad():
        for path in (0, 3, 5):
            gram = product = 0
            for name, expert in experts.items():
                features = merged[:path](data[name].double())
                own = features.T @ features
                own = alpha * own + (1 - alpha) * torch.diag(own.diagonal())
                gram, product = gram + own, product + expert[path].weight.double() @ own
            merged[path].weight.copy_(product @ torch.linalg.pinv(gram))
        for x in data.values():
            assert relative_error(ours(x), merged(x.double())) <= 1e-4
        torch.testing.assert_close(ours[1].weight, merge("linear", base=base, experts=experts).model[1].weight)


def test_a_bad_ratio_is_refused():
    base = nn.Linear(3, 2)
    data = {name: [torch.randn(4, 3)] for name in "abc"}
    with pytest.raises(ValueError, match="reduce_non_diagonal_ratio: expected a number in"):
        merge(
            "regmean_plus_plus",
            base=base,
            experts=make_experts(base),
            calibration=data,
            reduce_non_diagonal_ratio=1.5,
        )
