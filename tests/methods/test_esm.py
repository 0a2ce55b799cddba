"""ESM against the paper's steps on raw features in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from statsmerge_ext.errors import MethodError
from tests.closed_forms import fine_tuned, grouped_patches, make_experts, relative_error
from tests.execution_order import inputs, seen

POWER = 1.7


def polarised(sizes, power=POWER):
    return (sizes / sizes.mean()) ** power


def orthonormal(x):
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return s.mean() * u @ vh


def reference(features, task_vectors, power=POWER):
    """From X_k [tokens, in] and τ_k [out, in], before the layer's own factor."""
    rank = min(task_vectors[0].shape) // len(task_vectors)
    factors = polarised(torch.stack([t.norm() for t in task_vectors]), power)
    left, right = [], []
    for x, t, factor in zip(features, task_vectors, factors, strict=True):
        directions = torch.linalg.svd(x @ t.T, full_matrices=False)[2][:rank]
        left.append(directions.T)
        right.append(factor * directions @ t)
    right = torch.cat(right)
    return orthonormal(torch.cat(left, 1)) @ orthonormal(right * polarised(right.norm(dim=0), power))


def task_vectors(base, experts, path):
    start = base.get_submodule(path).weight.double()
    return [expert.get_submodule(path).weight.double() - start for expert in experts.values()]


def merged(base, experts, data, **options):
    calibration = {name: [x[:3], x[3:]] for name, x in data.items()}
    return merge("esm", base=base, experts=experts, calibration=calibration, **options).model


def uneven_experts(base):
    return {name: fine_tuned(base, seed, 0.05 * (seed + 1)) for seed, name in enumerate("abc")}


def test_linear_layers_and_the_factor_of_each_among_its_like():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12))
    experts, data = uneven_experts(base), inputs(40, 9)
    ours = merged(base, experts, data, scaling_factor=0.8, polarisation=POWER)
    features = {name: seen(expert.double(), data[name].double()) for name, expert in uneven_experts(base).items()}
    expected = {}
    for path in ("0", "2", "4"):
        rows = [features[name][path][0] for name in experts]
        expected[path] = reference(rows, task_vectors(base, experts, path))
    alike = torch.stack([expected["0"].norm(), expected["4"].norm()])
    factors = dict(zip(("0", "4"), polarised(alike), strict=True)) | {"2": 1.0}
    assert abs(factors["0"] - 1) > 0.02
    for path, moved in expected.items():
        got = ours.get_submodule(path).weight.double() - base.get_submodule(path).weight.double()
        assert relative_error(got, 0.8 * factors[path] * moved) <= 1e-4
    mean = sum(expert[2].bias - base[2].bias for expert in experts.values()) / 3
    torch.testing.assert_close(ours[2].bias, base[2].bias + mean)


def test_groups_of_a_convolution_are_matrices_of_their_own():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 12, 3, groups=2))
    experts, data = uneven_experts(base), inputs(5, 4, 6, 6)
    ours = merged(base, experts, data, polarisation=POWER)[0].weight.double() - base[0].weight.double()
    patches = [grouped_patches(data[name].double(), base[0]) for name in experts]
    parts = [t.flatten(1).chunk(2) for t in task_vectors(base, experts, "0")]
    for group, part in enumerate(ours.flatten(1).chunk(2)):
        expected = reference([rows[group] for rows in patches], [t[group] for t in parts])
        assert relative_error(part, expected) <= 1e-4


def test_without_polarisation_all_factors_are_1():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 12))
    experts, data = uneven_experts(base), inputs(40, 9)
    ours = merged(base, experts, data, polarisation=0.0)[0].weight.double() - base[0].weight.double()
    expected = reference([data[name].double() for name in experts], task_vectors(base, experts, "0"), power=0)
    assert relative_error(ours, expected) <= 1e-4


def test_narrow_and_uncalled_layers_take_the_mean():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.unused, self.depthwise = nn.Linear(8, 2), nn.Linear(8, 8), nn.Conv1d(2, 2, 3, groups=2)

        def forward(self, x):
            return self.depthwise(self.narrow(x).mT)

    torch.manual_seed(0)
    base = Model()
    experts = make_experts(base)
    ours = merged(base, experts, inputs(6, 10, 8)).state_dict()
    for key, start in base.state_dict().items():
        mean = sum(expert.state_dict()[key] - start for expert in experts.values()) / 3
        torch.testing.assert_close(ours[key], start + mean)


def test_experts_that_are_the_base_give_it_back():
    base = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 9))
    ours = merged(base, {name: base for name in "abc"}, inputs(6, 9)).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in base.state_dict().items())


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_bad_polarisation(value):
    base = nn.Sequential(nn.Linear(9, 12))
    with pytest.raises(MethodError, match="polarisation: expected a number of at least 0"):
        merged(base, make_experts(base), inputs(6, 9), polarisation=value)
