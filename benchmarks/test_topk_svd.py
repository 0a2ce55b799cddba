"""topk_svd: the three leading singular values to 1e-3, beside full, randomised and Lanczos decompositions.

Every peer gets float32 (bfloat16 is converted in its timed run). ARPACK and PROPACK get tolerances that leave them
errors like ours or, as they count in restarts and steps, smaller ones; looser tolerances make them no faster.
svd_lowrank has no tolerance, which is what its error column is about.
"""

from __future__ import annotations

import pytest
import torch
from harness import OURS, Bar, Route, Work, has_package, relative_error, seeded
from torch import Tensor

from statsmerge_ext import ops

K, TOL = 3, 1e-3
MAX_STEPS = 500  # of PROPACK, which does not restart: its default of 30 is too few for a Gaussian matrix
LARGE = 32 * 2**20  # bytes; a smaller matrix stays in the caches from pass to pass


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded())


def power_law(*shape: int) -> Tensor:
    """Singular values falling like 1/√i, as trained weights' do, in random bases."""
    inner = min(shape[-2:])
    left, right = (torch.linalg.qr(gaussian(*shape[:-2], size, inner)).Q for size in shape[-2:])
    return (left * torch.arange(1.0, inner + 1).rsqrt()) @ right.mT


def exact_values(mats: Tensor) -> Tensor:
    """From the float64 Gram of the smaller side, which for leading values is as good as a float64 decomposition."""
    values = []
    for mat in mats.double():
        gram = mat @ mat.T if mat.shape[0] < mat.shape[1] else mat.T @ mat
        values.append(torch.linalg.eigvalsh(gram).flip(-1)[:K].sqrt())
    return torch.stack(values)


def ours_work(mats: Tensor):
    """Every pass multiplies K vectors or more by A and Aᵀ; a matrix that fits the caches comes from memory once."""
    count, m, n = mats.shape
    size = m * n * mats.element_size()

    def work(result: ops.TopKSVD) -> Work:
        passes = float(result.passes.sum())
        return Work(read=size * (passes if size > LARGE else count), flops=4.0 * m * n * K * passes)

    return work


def dense_work(mats: Tensor) -> Work:
    """Reduction to bidiagonal form, of the triangular factor if that is cheaper."""
    count, long, short = len(mats), max(mats.shape[1:]), min(mats.shape[1:])
    flops = min(4 * short**2 * (long - short / 3), 2 * short**2 * (long + short))
    return Work(read=4 * mats.numel(), flops=count * flops)


def lowrank_work(mats: Tensor) -> Work:
    """Six products with K vectors."""
    large = 4 * mats[0].numel() > LARGE
    return Work(read=4 * mats.numel() * (6 if large else 1), flops=6 * 2 * K * mats.numel())


def routes_of(mats: Tensor, slow: int | None = None) -> dict[str, Route]:
    """``slow``: the dense decomposition takes part in so many rounds."""
    routes = {
        OURS: Route(lambda: ops.topk_svd(mats, K, tol=TOL), ours_work(mats)),
        "svdvals": Route(lambda: torch.linalg.svdvals(mats.float())[:, :K], dense_work(mats), rounds=slow),
        "svd_lowrank": Route(lambda: torch.svd_lowrank(mats.float(), q=K, niter=2)[1], lowrank_work(mats)),
    }
    if has_package("scipy"):
        from scipy.sparse.linalg import svds

        def lanczos(solver: str, **options) -> Tensor:
            options.update(solver=solver, return_singular_vectors=False, rng=0)
            found = [svds(mat.float().numpy(), K, **options) for mat in mats]
            return torch.stack([torch.from_numpy(values.copy()) for values in found]).sort(descending=True).values

        routes["ARPACK"] = Route(lambda: lanczos("arpack", tol=1e-2), rounds=slow and slow + 1)
        routes["PROPACK"] = Route(lambda: lanczos("propack", tol=0.03, maxiter=MAX_STEPS), rounds=slow and slow + 1)
    if has_package("scikit-learn"):
        from sklearn.utils.extmath import randomized_svd

        def randomised() -> Tensor:
            return torch.stack(
                [torch.from_numpy(randomized_svd(mat.float().numpy(), K, random_state=0)[1]) for mat in mats]
            )

        routes["randomized_svd"] = Route(randomised, rounds=slow and slow + 1)
    return routes


def values_of(result: object) -> Tensor:
    return result.S if isinstance(result, ops.TopKSVD) else result


def worst_error(exact: Tensor):
    return lambda result: {"error": float(((values_of(result).double() - exact).abs() / exact).max())}


def bars_of(at_least: float, towards: float) -> tuple[Bar, ...]:
    return Bar("svdvals", at_least, towards), Bar("svd_lowrank", 1), Bar("ARPACK", 4), Bar("PROPACK", 4)


@pytest.mark.parametrize("spectrum", [gaussian, power_law])
@pytest.mark.parametrize(
    ("shape", "bars", "slow"),
    [((96, 768, 768), (20, 50), 1), ((1, 3072, 768), (15, 40), None), ((1, 768, 3072), (15, 40), None)],
    ids=str,
)
def test_matrices(case, spectrum, shape, bars, slow):
    mats = spectrum(*shape)
    name = f"{' × '.join(map(str, shape))} float32, {spectrum.__name__.replace('_', ' ')}"
    case(name, routes_of(mats, slow), errors=worst_error(exact_values(mats)), bound=TOL, rounds=5, bars=bars_of(*bars))


@pytest.mark.parametrize(
    ("shape", "dtype", "bars"),
    [
        pytest.param((1, 4096, 4096), torch.float32, (60, 120), id="4096-float32"),
        pytest.param((1, 4096, 14336), torch.bfloat16, (100, None), id="14336-bfloat16", marks=pytest.mark.long),
    ],
)
def test_large(case, shape, dtype, bars):
    mats = gaussian(*shape).to(dtype)
    name = f"{' × '.join(map(str, shape[1:]))} {str(dtype)[6:]}, gaussian"
    routes = routes_of(mats, slow=1)
    case(name, routes, errors=worst_error(exact_values(mats)), bound=TOL, rounds=3, bars=bars_of(*bars))


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1024, 16, 16), (256, 32, 32), (64, 64, 64), (16, 128, 128)], ids=str)
def test_small(case, shape):
    mats = gaussian(*shape)
    routes = {name: route for name, route in routes_of(mats).items() if name in (OURS, "svdvals", "svd_lowrank")}
    name = f"{' × '.join(map(str, shape))} float32, gaussian"
    case(name, routes, errors=worst_error(exact_values(mats)), bound=TOL, warm=True)


def test_vectors(case):
    mat = power_law(768, 3072)
    exact = exact_values(mat[None])[0]

    def errors(result: tuple) -> dict[str, float]:
        u, s, vh = (part.double() for part in result)
        residual = torch.maximum(
            (mat @ vh.mT.float() - (u * s).float()).norm(dim=0), (mat.T @ u.float() - (vh.mT * s).float()).norm(dim=0)
        )
        eye = torch.eye(K, dtype=torch.float64)
        return {
            "error": float(((s - exact).abs() / exact).max()),
            "residual": float((residual / exact).max()),
            "orthogonality": max(float((u.mT @ u - eye).norm()), float((vh @ vh.mT - eye).norm())),
        }

    def ours() -> tuple:
        result = ops.topk_svd(mat[None], K, tol=TOL, vectors=True)
        return result.U[0], result.S[0], result.Vh[0]

    def full() -> tuple:
        u, s, vh = torch.linalg.svd(mat, full_matrices=False)
        return u[:, :K], s[:K], vh[:K]

    def lowrank() -> tuple:
        u, s, v = torch.svd_lowrank(mat, q=K, niter=2)
        return u, s, v.mT

    routes = {OURS: Route(ours), "svd": Route(full), "svd_lowrank": Route(lowrank)}
    case("768 × 3072 float32, power law, with vectors", routes, errors=errors, bound=TOL, rounds=5)


def test_statistics(case):
    mats = list(gaussian(12, 768, 768))
    exact = torch.stack(
        [
            torch.cat([torch.stack([mat.mean(), mat.var(correction=0), mat.norm()]), values])
            for mat, values in zip((m.double() for m in mats), exact_values(torch.stack(mats)), strict=True)
        ]
    )

    def plain() -> Tensor:
        rows = [
            torch.cat([torch.stack([m.mean(), m.var(correction=0), m.norm()]), torch.linalg.svdvals(m)[:K]])
            for m in mats
        ]
        return torch.stack(rows)

    routes = {OURS: Route(lambda: ops.weight_statistics(mats, K)), "mean, var, norm, svdvals": Route(plain)}

    def errors(result):
        return {"error": relative_error(result, exact)}

    case("weight_statistics, 12 × 768 × 768 float32", routes, errors=errors, bound=TOL, rounds=5)
