"""layer_solve beside pseudoinverses and a plain Cholesky solve; errors are residuals ‖T C − D‖ / ‖D‖ in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from statsmerge_ext.ops import layer_solve

from .measuring import Bench, Candidate, Case, relative_error


def cases(bench: Bench) -> Iterator[Case]:
    if bench.tiny:
        yield case(bench, 3, 20, 5, 20, {"pinv": 1, "pinv of symmetric": 3})
        return
    yield case(bench, 72, 768, 768, 20, {"pinv": 2, "pinv of symmetric": 8})
    yield case(bench, 1, 4096, 4096, 10, {"pinv": 1, "pinv of symmetric": 1})
    yield case(bench, 1, 14336, 4096, 10, {"pinv of symmetric": 1})


def case(bench: Bench, batch: int, n: int, out: int, ratio: float, peers: dict[str, int]) -> Case:
    """peers: of how many systems each is run; all of them take `batch` over that as long."""
    x = bench.randn(batch, 2 * n, n)
    c = x.mT @ x
    del x
    d = bench.randn(batch, out, n) @ c

    def residual(count: int) -> Callable[[torch.Tensor], float]:
        return lambda t: relative_error(t.double() @ c[:count].double(), d[:count])

    def pinv(count: int, hermitian: bool) -> Callable[[], torch.Tensor]:
        return lambda: d[:count] @ torch.linalg.pinv(c[:count], hermitian=hermitian)

    def cholesky() -> torch.Tensor:
        factor = torch.linalg.cholesky_ex(c.double()).L
        return torch.cholesky_solve(d.double().mT, factor).mT

    candidates = {"ours": Candidate([lambda: layer_solve(c, d).T], residual(batch))}
    for name, count in peers.items():
        call = pinv(count, name != "pinv")
        candidates[name] = Candidate([call], residual(count), scale=batch / count)
    candidates["cholesky_solve"] = Candidate([cholesky], residual(batch))
    return Case(
        "layer_solve",
        f"{batch} × in {n}, out {out}",
        candidates,
        bytes=8.0 * batch * n * (n + 2 * out),
        flops=batch * (n**3 / 3 + 2 * n * n * out),
        rate="fp64",
        bar=(next(iter(peers)), ratio),
    )
