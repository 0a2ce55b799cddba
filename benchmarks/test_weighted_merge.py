"""weighted_merge and its gradient on all tensors of a ViT-B/32 with eight experts, beside chains of foreach operations.

One fused pass moves (K + 2) · P elements, a chain over all tensors 3 · K · P. A loop that finishes one tensor before
the next finds its running sum in the caches and moves no more than the fused pass; so does a loop of dot products with
its gradient, (K + 1) · P.
The memory for the merged tensors is new in every run of every route, as it is in a merge.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import OURS, Bar, Route, Work, relative_error, seeded
from torch import Tensor

from statsmerge_ext import ops
from statsmerge_ext.ops import QuantizedTensor

TASKS = 8
WIDTH, HIDDEN, BLOCKS = 768, 3072, 12
BLOCK = [(WIDTH, WIDTH), (WIDTH,)] * 4 + [(HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)] + [(WIDTH,)] * 4
VIT = [(WIDTH, 3, 32, 32), (50, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), *BLOCK * BLOCKS, (WIDTH,), (WIDTH,)]
PARAMETERS = sum(torch.Size(shape).numel() for shape in VIT)

Tensors = list[Tensor]


def uniform(shapes: list, generator: torch.Generator) -> Tensors:
    return [torch.empty(shape).uniform_(-1, 1, generator=generator) for shape in shapes]


class Models:
    """A base, its experts' task vectors, a coefficient a tensor and expert, gradients of the merged tensors."""

    def __init__(
        self, shapes: list, dtype: torch.dtype = torch.float32, task_vectors: list[Tensors] | None = None
    ) -> None:
        generator = seeded()
        self.base = [t.to(dtype) for t in uniform(shapes, generator)]
        self.coefficients = torch.rand(len(shapes), TASKS, generator=generator)
        self.task_vectors = task_vectors or [[t.to(dtype) for t in uniform(shapes, generator)] for _ in range(TASKS)]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.base)

    def exact(self, rows: range) -> Tensors:
        """In float64, of some tensors."""
        return [
            self.base[l].double()
            + sum(
                c * task[l].double() for c, task in zip(self.coefficients[l].double(), self.task_vectors, strict=True)
            )
            for l in rows
        ]

    def errors(self, result: Tensors) -> dict[str, float]:
        """Of the first and last few tensors, which have every shape among them: float64 of all would take 0.7 GB."""
        rows = [*range(min(16, len(self.base))), *range(max(0, len(self.base) - 4), len(self.base))]
        exact = self.exact(rows)
        return {"error": max(relative_error(result[l], e) for l, e in zip(rows, exact, strict=True))}


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(VIT)


def fused_work(models: Models, task_bytes: float | None = None) -> Work:
    read = models.bytes * (1 + TASKS) if task_bytes is None else models.bytes + TASKS * task_bytes
    return Work(read=read, written=models.bytes)


def chain_work(models: Models) -> Work:
    return Work(read=2 * TASKS * models.bytes, written=TASKS * models.bytes)


def chains(models: Models) -> dict[str, Route]:
    """What plain torch offers, from the usual way to the best."""
    base, task_vectors = models.base, models.task_vectors
    columns = models.coefficients.T
    scalars = [column.to(base[0].dtype) for column in columns]

    def mul_add() -> Tensors:
        merged = [b.clone() for b in base]
        for column, vectors in zip(columns.tolist(), task_vectors, strict=True):
            torch._foreach_add_(merged, torch._foreach_mul(vectors, column))
        return merged

    def addcmul() -> Tensors:
        merged = [b.clone() for b in base]
        for column, vectors in zip(scalars, task_vectors, strict=True):
            torch._foreach_addcmul_(merged, vectors, list(column))
        return merged

    def loop() -> Tensors:
        merged = []
        for b, row, *taus in zip(base, models.coefficients.tolist(), *task_vectors, strict=True):
            total = torch.add(b, taus[0], alpha=row[0])
            for c, tau in zip(row[1:], taus[1:], strict=True):
                total.add_(tau, alpha=c)
            merged.append(total)
        return merged

    return {
        "foreach mul, add": Route(mul_add, chain_work(models)),
        "foreach addcmul": Route(addcmul, chain_work(models)),
        "add_ tensor by tensor": Route(loop, fused_work(models)),
    }


def compiled(models: Models) -> Route:
    """torch.compile of one tensor's whole sum, for tensors of any length."""

    @torch.compile(dynamic=True)
    def merge(base: Tensor, task_vectors: Tensors, row: Tensor) -> Tensor:
        total = base
        for k, tau in enumerate(task_vectors):
            total = total + row[k] * tau
        return total

    def run() -> Tensors:
        merged = []
        for b, row, *taus in zip(models.base, models.coefficients, *models.task_vectors, strict=True):
            merged.append(merge(b.flatten(), [t.flatten() for t in taus], row).view(b.shape))
        return merged

    return Route(run, fused_work(models))


def ours(models: Models) -> Route:
    return Route(lambda: ops.weighted_merge(models.base, models.task_vectors, models.coefficients), fused_work(models))


def test_forward(case, models):
    routes = {OURS: ours(models), **chains(models), "torch.compile": compiled(models)}
    bars = (Bar("foreach mul, add", 2.0, 2.4), Bar("foreach addcmul", 2.0, 2.4))
    name = f"{PARAMETERS / 1e6:.0f} M parameters, K = 8, float32"
    case(name, routes, errors=models.errors, bound=1e-6, rounds=5, bars=bars)


def test_gradient(case, models):
    gradients = uniform(VIT, seeded(1))
    coefficients = models.coefficients.clone().requires_grad_()
    merged = ops.weighted_merge(models.base, models.task_vectors, coefficients)

    def contract(dot: Callable[[Tensor, Tensor], Tensor]) -> Route:
        def run() -> Tensor:
            rows = [torch.stack([dot(tau, g) for tau in taus]) for g, *taus in zip(gradients, *models.task_vectors)]
            return torch.stack(rows)

        return Route(run, Work(read=(TASKS + 1) * models.bytes))

    def foreach() -> Tensor:
        products = [torch._foreach_mul(vectors, gradients) for vectors in models.task_vectors]
        return torch.stack([torch.stack([p.sum() for p in column]) for column in products], 1)

    routes = {
        OURS: Route(
            lambda: torch.autograd.grad(merged, coefficients, gradients, retain_graph=True)[0],
            Work(read=(TASKS + 1) * models.bytes),
        ),
        "dot": contract(lambda tau, g: torch.dot(tau.view(-1), g.view(-1))),
        "foreach mul, sum": Route(foreach, Work(read=3 * TASKS * models.bytes, written=TASKS * models.bytes)),
    }
    exact = torch.stack(
        [
            torch.stack([torch.dot(tau.double().flatten(), g.double().flatten()) for tau in taus])
            for g, *taus in zip(gradients, *models.task_vectors, strict=True)
        ]
    )
    bars = (Bar("dot", 1.5, 1.8), Bar("foreach mul, sum", 1.5, 1.8))
    name = f"gradient, {PARAMETERS / 1e6:.0f} M parameters, K = 8, float32"
    case(name, routes, errors=lambda g: {"error": relative_error(g, exact)}, bound=1e-5, rounds=5, bars=bars)


def test_bfloat16(case):
    models = Models(VIT, torch.bfloat16)
    routes = {OURS: ours(models), **chains(models)}
    name = f"{PARAMETERS / 1e6:.0f} M parameters, K = 8, bfloat16"
    case(name, routes, errors=models.errors, bound=4e-3, rounds=3)


def random_codes(shape: tuple, bits: int, generator: torch.Generator) -> QuantizedTensor:
    """A quantised tensor with one scale: uniform codes are as good as those of any weights."""
    shape = torch.Size(shape)
    padded = -(-shape.numel() // 8) * 8
    codes = torch.randint(256, (padded * bits // 8,), dtype=torch.uint8, generator=generator)
    zero_point = torch.tensor([2 ** (bits - 1)], dtype=torch.int32)
    return QuantizedTensor(codes, torch.tensor([2.0 ** (1 - bits)]), zero_point, bits, padded, shape)


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """With torch's byte operations, an element type as narrow as the codes allow."""
    codes, bits = tensor.codes, tensor.bits
    if bits == 3:
        first, second, third = codes.view(-1, 3).int().unbind(1)
        words = first | second << 8 | third << 16
        values = torch.stack([words >> shift & 7 for shift in range(0, 24, 3)], 1)
    elif bits == 8:
        values = codes
    else:
        values = torch.stack([codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)], 1)
    floats = values.view(-1)[: tensor.shape.numel()].float()
    return floats.sub_(float(tensor.zero_point)).mul_(float(tensor.scale)).view(tensor.shape)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_quantised(case, bits):
    generator = seeded(bits)
    codes = [[random_codes(shape, bits, generator) for shape in VIT] for _ in range(TASKS)]
    models = Models(VIT, task_vectors=[[dequantize(tensor) for tensor in task] for task in codes])

    def then_merge() -> Tensors:
        merged = []
        for b, row, *taus in zip(models.base, models.coefficients.tolist(), *codes, strict=True):
            total = torch.add(b, dequantize(taus[0]), alpha=row[0])
            for c, tau in zip(row[1:], taus[1:], strict=True):
                total.add_(dequantize(tau), alpha=c)
            merged.append(total)
        return merged

    routes = {
        OURS: Route(
            lambda: ops.weighted_merge(models.base, codes, models.coefficients),
            fused_work(models, PARAMETERS * bits / 8),
        ),
        "dequantise, then merge": Route(then_merge, rounds=2),
        "statsmerge, from float32": ours(models),
    }
    bars = (Bar("dequantise, then merge", 3), Bar("statsmerge, from float32", 1))
    name = f"{PARAMETERS / 1e6:.0f} M parameters, K = 8, int{bits}"
    case(name, routes, errors=models.errors, bound=1e-6, rounds=5, bars=bars)


@pytest.mark.quick
@pytest.mark.parametrize(("count", "size"), [(200, 64), (20, 4096)], ids=str)
def test_small(case, count, size):
    models = Models([(size,)] * count)
    routes = {OURS: ours(models), **chains(models)}
    case(f"{count} tensors of {size}, K = 8, float32", routes, errors=models.errors, bound=1e-6, rounds=21, warm=True)
