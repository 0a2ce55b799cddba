"""The four operators beside what plain torch offers: time, and error against float64.

Run with ``make bench``. Each group is one case; within it ours and its peers run in the same session on the same tensors.
Errors are in ``extra_info`` of the JSON that ``--benchmark-json`` writes.
"""

from __future__ import annotations

import pytest
import torch

from statsmerge_ext import ops


def relative_error(ours, reference):
    return float((ours.double() - reference).norm() / reference.norm())


def measure(benchmark, group, function, reference, value=lambda result: result):
    """Time ``function`` and judge the value that was timed."""
    benchmark.group = group
    result = benchmark.pedantic(function, rounds=7, warmup_rounds=1)
    benchmark.extra_info["error"] = relative_error(value(result), reference)


@pytest.fixture(scope="module")
def matrices():
    weights = torch.randn(8, 768, 768, generator=torch.Generator().manual_seed(0))
    return weights, torch.linalg.svdvals(weights.double())[:, :3]


@pytest.mark.parametrize("route", ["statsmerge", "svdvals", "svd_lowrank"])
def test_topk_svd(benchmark, matrices, route):
    weights, reference = matrices
    routes = {
        "statsmerge": lambda: ops.topk_svd(weights, 3, tol=1e-3).S,
        "svdvals": lambda: torch.linalg.svdvals(weights)[:, :3],
        "svd_lowrank": lambda: torch.svd_lowrank(weights, q=3, niter=2)[1],
    }
    measure(benchmark, "topk_svd 8 × 768 × 768, k = 3", routes[route], reference)


@pytest.fixture(scope="module")
def features():
    x = torch.randn(8192, 768, generator=torch.Generator().manual_seed(0))
    return x, x.double().T @ x.double()


@pytest.mark.parametrize("route", ["statsmerge", "statsmerge_float64", "mm"])
def test_gram(benchmark, features, route):
    x, reference = features
    zeros = {dtype: torch.zeros(768, 768, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    routes = {
        "statsmerge": lambda: ops.symmetrize_(ops.gram_accumulate_(zeros[torch.float32].clone(), x)),
        "statsmerge_float64": lambda: ops.symmetrize_(ops.gram_accumulate_(zeros[torch.float64].clone(), x)),
        "mm": lambda: x.T @ x,
    }
    measure(benchmark, "gram 8192 × 768, float32", routes[route], reference)


@pytest.fixture(scope="module")
def system():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 768, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    product = torch.randn(3072, 768, generator=generator, dtype=torch.float64) @ gram
    return gram.float(), product.float(), product.float().double() @ torch.linalg.inv(gram.float().double())


@pytest.mark.parametrize("route", ["statsmerge", "pinv"])
def test_layer_solve(benchmark, system, route):
    gram, product, reference = system
    routes = {
        "statsmerge": lambda: ops.layer_solve(gram, product).T,
        "pinv": lambda: product @ torch.linalg.pinv(gram),
    }
    measure(benchmark, "layer_solve 768 → 3072", routes[route], reference)


@pytest.fixture(scope="module")
def models():
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 768)] * 8 + [(3072, 768)] * 2 + [(768,)] * 20
    base = [torch.randn(shape, generator=generator) for shape in shapes]
    task_vectors = [[0.01 * torch.randn(shape, generator=generator) for shape in shapes] for _ in range(8)]
    coefficients = torch.rand(len(shapes), 8, generator=generator)
    reference = torch.cat(
        [
            (b.double() + sum(c.double() * t[row].double() for c, t in zip(coefficients[row], task_vectors))).flatten()
            for row, b in enumerate(base)
        ]
    )
    return base, task_vectors, coefficients, reference


@pytest.mark.parametrize("route", ["statsmerge", "foreach"])
def test_weighted_merge(benchmark, models, route):
    base, task_vectors, coefficients, reference = models

    def foreach():
        merged = [b.clone() for b in base]
        for k, vectors in enumerate(task_vectors):
            torch._foreach_add_(merged, torch._foreach_mul(vectors, coefficients[:, k].tolist()))
        return merged

    routes = {"statsmerge": lambda: ops.weighted_merge(base, task_vectors, coefficients), "foreach": foreach}
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])  # noqa: E731
    measure(benchmark, "weighted_merge 9.4 M parameters, K = 8", routes[route], reference, flat)
