"""Data-free merging of weight matrices, against plain float64 decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from tests.closed_forms import fine_tuned, make_experts, relative_error

METHODS = ("wudi", "swudi", "ace", "tsv_m", "iso_c", "iso_cts")
EXACT = {"wudi": {"ridge": 1e-9}}  # the references are pseudo-inverses


def moved(base, experts, key):
    return [(e.state_dict()[key].double() - base.state_dict()[key].double()) for e in experts.values()]


def interference(task_vectors, norms):
    """X and Y of min ‖X Tᵀ − Y‖²."""
    pairs = list(zip(task_vectors, norms or [t.norm() for t in task_vectors], strict=True))
    return torch.cat([t / norm for t, norm in pairs]), torch.cat([t @ t.T / norm for t, norm in pairs])


def wudi(task_vectors, norms=None):
    rows, targets = interference(task_vectors, norms)
    return (torch.linalg.pinv(rows, rtol=1e-7) @ targets).T


def swudi(task_vectors, norms=None):
    """By the singular values of the rows, whose squares are the eigenvalues."""
    rows, targets = interference(task_vectors, norms)
    start = sum(task_vectors)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    rank = math.ceil(s.square().sum() ** 2 / s.pow(4).sum())
    time = 10 * rows.shape[1] / s.square().sum()
    filters = (1 - torch.exp(-time * s.square()))[:rank] / s[:rank]
    return start + ((targets - rows @ start.T).T @ u[:, :rank] * filters) @ vh[:rank]


def ace(task_vectors, ridge=1e-2, fraction=0.3):
    energies = torch.stack([t.square().sum() for t in task_vectors])
    differ = energies.log().var() > 0.3 * energies.log().mean() ** 2
    identity = torch.eye(task_vectors[0].shape[1], dtype=torch.float64)
    rows = [t - t.mean(0) for t in task_vectors]
    parts = [1 / t.square().sum() if differ else 1.0 for t in rows]
    plain = [part * t.T @ t for part, t in zip(parts, rows, strict=True)]
    shifted = [s + part * ridge * identity for s, part in zip(plain, parts, strict=True)]
    common = sum(plain).mean(0) / (energies.mean() if differ else 1)
    inverse = torch.linalg.inv(sum(shifted) + common)  # added to every row
    merged = sum(t @ s for t, s in zip(rows, shifted, strict=True)) @ inverse
    if differ:
        mean = sum(shifted) / len(shifted)
        residual = merged + sum(t @ (s - mean) for t, s in zip(task_vectors, plain, strict=True))
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        count = int(fraction * len(s))
        merged = merged + s[:count].mean() * u[:, :count] @ vh[:count]
    return merged


def orthonormal(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def iso_cts(task_vectors):
    size, count = min(task_vectors[0].shape), len(task_vectors)
    specific = round((size - int(0.8 * size)) / count)
    u, s, vh = torch.linalg.svd(sum(task_vectors), full_matrices=False)
    common = size - specific * count
    left, values, right = [u[:, :common]], [s[:common]], [vh[:common]]
    for t in task_vectors:
        u, s, vh = torch.linalg.svd(t - left[0] @ left[0].T @ t, full_matrices=False)
        left, values, right = left + [u[:, :specific]], values + [s[:specific]], right + [vh[:specific]]
    return torch.cat(values).mean() * orthonormal(torch.cat(left, 1)) @ orthonormal(torch.cat(right))


def tsv_m(task_vectors):
    rank = min(task_vectors[0].shape) // len(task_vectors)
    parts = [torch.linalg.svd(t, full_matrices=False) for t in task_vectors]
    left = orthonormal(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    right = orthonormal(torch.cat([vh[:rank] for _, _, vh in parts]))
    return left @ torch.diag(torch.cat([s[:rank] for _, s, _ in parts])) @ right


def iso_c(task_vectors):
    u, s, vh = torch.linalg.svd(sum(task_vectors), full_matrices=False)
    return s.mean() * u @ vh


REFERENCES = {"wudi": wudi, "swudi": swudi, "ace": ace, "tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts}


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
        # Of WUDI's, a task's weight is the whole layer's norm, not the group's.
        expected = REFERENCES[method](own, **({"norms": norms} if "wudi" in method else {}))
        assert relative_error(part, expected) <= 1e-4


def test_ace_with_tasks_of_different_sizes():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40))
    experts = {name: fine_tuned(base, seed, 10.0**-seed) for seed, name in enumerate("abc")}
    ours = merge("ace", base=base, experts=experts).model[0].weight.double() - base[0].weight.double()
    task_vectors = moved(base, experts, "0.weight")
    energies = torch.stack([t.square().sum() for t in task_vectors])
    assert energies.log().var() > 0.3 * energies.log().mean() ** 2
    assert relative_error(ours, ace(task_vectors)) <= 1e-4


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
