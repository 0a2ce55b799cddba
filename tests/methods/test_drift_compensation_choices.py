"""Drift compensation's options on a single layer, whose inputs cannot drift, against least squares on raw rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import merge
from statsmerge_ext.engine.spectral import gavish_donoho
from statsmerge_ext.errors import MethodError
from tests.closed_forms import make_experts, relative_error

RIDGE, DRIFT_RIDGE, SCALE = 2e-3, 4e-2, 1.2
COLUMNS = 12


def family():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(COLUMNS, 5, bias=False))
    spread = torch.logspace(0, -2, COLUMNS)
    data = {name: torch.randn(9 * (place + 1), COLUMNS) * spread * 4**place for place, name in enumerate("abc")}
    return base, make_experts(base), data


def compensated(**options):
    base, experts, data = family()
    options = {"ridge": RIDGE, "drift_ridge": DRIFT_RIDGE, "scaling_factor": SCALE, **options}
    calibration = {name: [x] for name, x in data.items()}
    model = merge("drift_compensation", base=base, experts=experts, calibration=calibration, **options).model
    return model[0].weight.detach().double()


def expected(weight=lambda x: 1.0, anchor=3.0, ridge=RIDGE, drift_ridge=DRIFT_RIDGE, respond=None):
    """W_0 + λ (W* − W_0), with ``respond`` from eigenvalues over their mean to f(λ); a ridge of its own by default."""
    base, experts, data = family()
    start = base[0].weight.detach().double()
    moved = {name: expert[0].weight.detach().double() - start for name, expert in experts.items()}
    gram, product = torch.zeros(COLUMNS, COLUMNS).double(), torch.zeros(5, COLUMNS).double()
    for name, x in data.items():
        own = weight(x.double()) * x.double().T @ x.double()
        gram, product = gram + own, product + moved[name] @ own
    mean = gram.trace() / COLUMNS
    values, vectors = torch.linalg.eigh(gram / mean)

    def solve(held, respond):
        return held + (product / mean - held @ gram / mean) @ vectors * respond(values) @ vectors.T

    held = solve(anchor * sum(moved.values()), lambda values: 1 / (values + ridge))
    return start + SCALE * solve(held, respond or (lambda values: 1 / (values + drift_ridge)))


def leading(count):
    return lambda values: torch.where(torch.arange(COLUMNS) >= COLUMNS - count, 1 / values, 0)


def effective_rank_of(values):
    return values.sum() ** 2 / values.square().sum()


def eigenvalues(weight=lambda x: 1.0):
    _, _, data = family()
    gram = sum(weight(x.double()) * x.double().T @ x.double() for x in data.values())
    return torch.linalg.eigvalsh(gram / gram.trace() * COLUMNS)


ROWS = 9 + 18 + 27
CASES = {
    "default": ({}, {}),
    "rows": (
        {"ridge_by": "rows"},
        {"ridge": RIDGE * (20 * COLUMNS / ROWS) ** 0.5, "drift_ridge": DRIFT_RIDGE * (20 * COLUMNS / ROWS) ** 0.5},
    ),
    "effective rank": (
        {"ridge_by": "effective_rank"},
        {"drift_ridge": DRIFT_RIDGE * float(effective_rank_of(eigenvalues()) / COLUMNS) ** 0.5},
    ),
    "held to the base": ({"anchor": "base"}, {"anchor": 0.0}),
    "held to the mean": ({"anchor": "mean"}, {"anchor": 1 / 3}),
    "held to a sum": ({"anchor": "sum", "anchor_scale": 0.25}, {"anchor": 0.25}),
    "weighted by Gram norms": ({"weighting": "gram"}, {"weight": lambda x: 1 / (x.T @ x).norm()}),
    "weighted by energies": ({"weighting": "energy"}, {"weight": lambda x: 1 / x.square().sum()}),
    "hard rank": ({"filter": "rank"}, {"respond": lambda values: torch.where(values > DRIFT_RIDGE, 1 / values, 0)}),
    "of effective rank": (
        {"filter": "effective_rank"},
        {"respond": leading(int(effective_rank_of(eigenvalues()).ceil()))},
    ),
    "Gavish and Donoho's rank": (
        {"filter": "gavish_donoho"},
        {"respond": leading(int(gavish_donoho(eigenvalues().unsqueeze(0), ROWS)))},
    ),
    "exponential": (
        {"filter": "exponential"},
        {"respond": lambda values: (1 - (-values / DRIFT_RIDGE).exp()) / values},
    ),
    "mixed inputs": ({"feature_mix": 0.5}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_choices(case):
    options, changed = CASES[case]
    assert relative_error(compensated(**options), expected(**changed)) <= 1e-5
    if changed:  # the comparison can fail
        assert relative_error(compensated(), expected(**changed)) > 1e-4


def test_ranks():
    """Few directions well above noise: Gavish and Donoho's threshold finds just them."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(200, 4, generator=generator) @ torch.randn(4, 50, generator=generator)
    x = (signal + 0.3 * torch.randn(200, 50, generator=generator)).double()
    assert int(gavish_donoho(torch.linalg.eigvalsh(x.T @ x).unsqueeze(0), 200)) == 4


def test_mixed_inputs_of_a_layer_that_others_precede():
    """With a mix of 1 every layer is solved for the experts' own inputs."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    experts, data = make_experts(base), {name: torch.randn(40, 6) for name in "abc"}
    calibration = {name: [x] for name, x in data.items()}

    def merged(mix):
        options = {"calibration": calibration, "drift_ridge": 1e-6, "scaling_factor": 1.0}
        return merge("drift_compensation", base=base, experts=experts, feature_mix=mix, **options).model

    def solved(inputs):
        x = torch.cat(list(inputs.values())).double()
        y = torch.cat([F.linear(own(name), experts[name][2].weight) for name in data]).detach().double()
        return torch.linalg.lstsq(x, y).solution.T

    def own(name):
        return experts[name][1](experts[name][0](data[name]))

    half, first = merged(0.5), merged(1.0)
    assert relative_error(first[2].weight, solved({name: own(name) for name in data})) <= 1e-3
    now = {name: torch.relu(half[0](x)) for name, x in data.items()}
    mixed = solved({name: (now[name] + own(name)).detach() / 2 for name in data})
    assert relative_error(half[2].weight, mixed) <= 1e-3
    assert relative_error(half[2].weight, first[2].weight) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "summ"}, "anchor: expected one of base, mean, sum, got 'summ' .did you mean 'sum'"),
        ({"filter": "pinv"}, "filter: expected one of ridge, rank, .*, got 'pinv'"),
        ({"weighting": "norm"}, "weighting: expected one of equal, gram, energy, got 'norm'"),
        ({"ridge_by": 3}, "ridge_by: expected one of eigenvalue, effective_rank, rows, got 3"),
        ({"feature_mix": 1.5}, r"feature_mix: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_choices_that_there_are_not(options, message):
    with pytest.raises(MethodError, match=message):
        compensated(**options)
