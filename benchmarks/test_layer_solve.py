"""layer_solve: T · C = D, beside the pseudo-inverse that LOT implementations form.

Errors are of the layer's outputs, ‖X(T − T*)ᵀ‖ / ‖X T*ᵀ‖ with XᵀX = C in float64: what a layer can tell.
"""

from __future__ import annotations

import pytest
import torch
from harness import OURS, Bar, Route, Work, seeded
from torch import Tensor

from statsmerge_ext import ops

TASKS = 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def output_errors(exact: Tensor, gram: Tensor):
    """Errors against T* weighted by the float64 Gram."""
    scale = float(((exact @ gram) * exact).sum())

    def errors(result: Tensor) -> dict[str, float]:
        difference = result.double() - exact
        return {"error": (max(0.0, float(((difference @ gram) * difference).sum())) / scale) ** 0.5}

    return errors


def cholesky_work(size: int, rows: int, batch: int = 1) -> Work:
    return Work(
        read=4 * batch * size * (size + rows),
        written=4 * batch * size * rows,
        flops=batch * (size**3 / 3 + 2 * size**2 * rows),
    )


def pivoted_work(size: int, rank: int, rows: int) -> Work:
    """A Cholesky factorisation with pivoting that stops at the rank, and products with its factor there and back."""
    return Work(flops=size * rank**2 - 2 * rank**3 / 3 + 4 * size * rank * rows)


def pinv_work(size: int, rows: int, dtype: str = "float32") -> Work:
    """A full singular value decomposition (about 22 n³ operations), its product, and the product with D."""
    return Work(flops=24 * size**3 + 2 * size**2 * rows, dtype=dtype)


def pinv_routes(gram: Tensor, product: Tensor, slow: int | None = None) -> dict[str, Route]:
    size, rows = gram.shape[-1], product.shape[-2]
    return {
        "pinv": Route(lambda: product @ torch.linalg.pinv(gram), pinv_work(size, rows), rounds=slow),
        "float64 pinv": Route(
            lambda: product.double() @ torch.linalg.pinv(gram.double()), pinv_work(size, rows, "float64"), rounds=slow
        ),
    }


def test_full_rank(case):
    x = normal(8192, 768)
    gram, exact = x.T @ x, normal(3072, 768, seed=1)
    c, d = gram.float(), (exact @ gram).float()
    routes = {OURS: Route(lambda: ops.layer_solve(c, d).T, cholesky_work(768, 3072)), **pinv_routes(c, d)}
    case("768 → 3072, solve alone", routes, errors=output_errors(exact, gram), bound=1e-5, rounds=5)


def test_whole_layer(case):
    """ΣG, ΣTG and the solution, as a merge goes through them."""
    features = [normal(1024, 768, seed=k) for k in range(TASKS)]
    exact_grams = torch.stack([x.T @ x for x in features])
    task_vectors = torch.stack([normal(3072, 768, seed=100 + k) for k in range(TASKS)])
    gram = exact_grams.sum(0)
    exact = torch.linalg.solve(gram, (task_vectors @ exact_grams).sum(0), left=False)
    grams, vectors = exact_grams.float(), task_vectors.float()

    def sums() -> tuple[Tensor, Tensor]:
        total, product = grams[0].clone(), vectors[0] @ grams[0]
        for g, t in zip(grams[1:], vectors[1:], strict=True):
            total += g
            product.addmm_(t, g)
        return total, product

    def ours() -> Tensor:
        total, product = torch.zeros_like(grams[0]), torch.zeros_like(vectors[0])
        for g, t in zip(grams, vectors, strict=True):
            total += g
            ops.gram_accumulate_(product, t.mT, other=g)
        return ops.layer_solve(total, product).T

    def pinv() -> Tensor:
        total, product = sums()
        return product @ torch.linalg.pinv(total)

    def float64_pinv() -> Tensor:
        total, product = sums()
        return product.double() @ torch.linalg.pinv(total.double())

    extra = TASKS * 2 * 768**2 * 3072
    solve, full = cholesky_work(768, 3072), pinv_work(768, 3072)
    routes = {
        OURS: Route(ours, Work(flops=solve.flops + extra)),
        "pinv": Route(pinv, Work(flops=full.flops + extra)),
        "float64 pinv": Route(float64_pinv, Work(flops=full.flops + extra, dtype="float64")),
    }
    bars = (Bar("pinv", 8, 12),)
    case(
        "768 → 3072, K = 8: ΣG, ΣTG, solve", routes, errors=output_errors(exact, gram), bound=1e-5, rounds=5, bars=bars
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient(case, dtype):
    """Grams in float64, as evidence is collected, have the features' rank; rounded to float32 they have full rank."""
    x = normal(1600, 3072)
    gram, exact = x.T @ x, normal(768, 3072, seed=1)
    c, d = gram.to(dtype), (exact @ gram).to(dtype)
    rcond = 3072 * torch.finfo(torch.float32).eps

    def hermitian() -> Tensor:
        return d.double() @ torch.linalg.pinv(c.double(), rtol=rcond, hermitian=True)

    def general() -> Tensor:
        return d.double() @ torch.linalg.pinv(c.double(), rtol=rcond)

    routes = {
        OURS: Route(lambda: ops.layer_solve(c, d, rcond=rcond).T, pivoted_work(3072, 1600, 768)),
        "float64 pinv": Route(general, pinv_work(3072, 768, "float64"), rounds=1),
        "float64 pinv, hermitian": Route(hermitian, rounds=1),
    }
    bars = (Bar("float64 pinv", 10, 20),)
    name = f"3072 → 768, rank 1600, {str(dtype).removeprefix('torch.')} Gram"
    case(name, routes, errors=output_errors(exact, gram), bound=1e-3, rounds=2, bars=bars)


def test_thin(case):
    """Fewer tokens than inputs: from the features themselves."""
    xs = [normal(64, 3072, seed=k).float() for k in range(TASKS)]
    ts = [normal(768, 3072, seed=100 + k).float() for k in range(TASKS)]
    x = torch.cat(xs)
    targets = torch.cat([x @ t.T for x, t in zip(xs, ts, strict=True)])
    gram = x.double().T @ x.double()
    exact = (torch.linalg.pinv(x.double()) @ targets.double()).T

    def lstsq() -> Tensor:
        y = torch.cat([x @ t.T for x, t in zip(xs, ts, strict=True)])
        return torch.linalg.lstsq(torch.cat(xs), y, driver="gelsd").solution.T

    tokens, size = x.shape
    work = Work(
        flops=tokens**2 * size + tokens**3 / 3 + 4 * tokens * size * 768
    )  # X Xᵀ, its factor, the targets and Xᵀ
    routes = {OURS: Route(lambda: ops.layer_solve_features(xs, ts).T, work), "lstsq": Route(lstsq)}
    case("features 512 × 3072 → 768", routes, errors=output_errors(exact, gram), bound=1e-5, rounds=5)


@pytest.mark.quick
@pytest.mark.parametrize(("batch", "size", "rows"), [(1152, 9, 1), (96, 25, 1), (32, 64, 64), (8, 192, 192)], ids=str)
def test_batches(case, batch, size, rows):
    x = normal(batch, 8 * size, size)
    gram, exact = x.mT @ x, normal(batch, rows, size, seed=1)
    c, d = gram.float(), (exact @ gram).float()
    routes = {
        OURS: Route(lambda: ops.layer_solve(c, d).T, cholesky_work(size, rows, batch)),
        "pinv": pinv_routes(c, d)["pinv"],
        "solve": Route(lambda: torch.linalg.solve(c, d, left=False)),
    }
    name = f"batch of {batch}: {size} → {rows}"
    case(name, routes, errors=output_errors(exact, gram), bound=1e-5, rounds=11, warm=True)
