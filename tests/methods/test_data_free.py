"""Data-free merging of weight matrices, against plain float64 decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from tests.closed_forms import make_experts, relative_error

METHODS = ("wudi", "tsv_m", "iso_c")
EXACT = {"wudi": {"ridge": 1e-9}}  # the references are pseudo-inverses


def moved(base, experts, key):
    return [(e.state_dict()[key].double() - base.state_dict()[key].double()) for e in experts.values()]


def wudi(task_vectors):
    rows = torch.cat([t / t.norm() for t in task_vectors])
    targets = torch.cat([t @ t.T / t.norm() for t in task_vectors])  # rows · Tᵀ = targets, in the least squares' sense
    return (torch.linalg.pinv(rows, rtol=1e-7) @ targets).T


def tsv_m(task_vectors):
    rank = min(task_vectors[0].shape) // len(task_vectors)
    parts = [torch.linalg.svd(t, full_matrices=False) for t in task_vectors]

    def orthonormal(matrix):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh

    left = orthonormal(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    right = orthonormal(torch.cat([vh[:rank] for _, _, vh in parts]))
    return left @ torch.diag(torch.cat([s[:rank] for _, s, _ in parts])) @ right


def iso_c(task_vectors):
    u, s, vh = torch.linalg.svd(sum(task_vectors), full_matrices=False)
    return s.mean() * u @ vh


REFERENCES = {"wudi": wudi, "tsv_m": tsv_m, "iso_c": iso_c}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (120, 30)], ids=str)
def test_linear(method, shape):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    experts = make_experts(base)
    merged = merge(method, base=base, experts=experts, scaling_factor=0.7, **EXACT.get(method, {})).model
    ours = merged[0].weight.double() - base[0].weight.double()
    assert relative_error(ours, 0.7 * REFERENCES[method](moved(base, experts, "0.weight"))) <= 1e-4
    torch.testing.assert_close(
        merged[0].bias.double(), base[0].bias.double() + sum(moved(base, experts, "0.bias")) / 3, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_a_convolution_are_matrices_of_their_own(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2))
    experts = make_experts(base)
    merged = merge(method, base=base, experts=experts, **EXACT.get(method, {})).model
    ours = merged[0].weight.double() - base[0].weight.double()
    task_vectors = [t.flatten(1).chunk(2) for t in moved(base, experts, "0.weight")]
    norms = [torch.cat(t).norm() for t in task_vectors]
    for group, part in enumerate(ours.flatten(1).chunk(2)):
        own = [t[group] for t in task_vectors]
        if method == "wudi":  # a task's weight is the whole layer's norm, not the group's
            rows = torch.cat([t / n for t, n in zip(own, norms, strict=True)])
            expected = (torch.linalg.pinv(rows) @ torch.cat([t @ t.T / n for t, n in zip(own, norms, strict=True)])).T
        else:
            expected = REFERENCES[method](own)
        assert relative_error(part, expected) <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_depthwise_convolutions_and_zero_task_vectors(method):
    base = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval()
    same = merge(method, base=base, experts={name: base for name in "abc"})
    for key, value in base.state_dict().items():
        assert torch.equal(same.state[key], value), key
    merged = merge(method, base=base, experts=make_experts(base))
    assert all(value.isfinite().all() for value in merged.state.values())
    assert not torch.equal(merged.state["0.weight"], base[0].weight)


@pytest.mark.parametrize("method", METHODS)
def test_state_dicts_will_do(method):
    base = nn.Sequential(nn.Linear(9, 7))
    experts = {name: expert.state_dict() for name, expert in make_experts(base).items()}
    merged = merge(method, base=base.state_dict(), experts=experts).state
    assert torch.equal(merged["0.weight"], merge(method, base=base, experts=experts).state["0.weight"])
