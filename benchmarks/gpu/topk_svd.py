"""topk_svd for all weights of a model at once, beside the singular values that libraries compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from statsmerge_ext.ops import topk_svd

from .measuring import Bench, Candidate, Case
from .models import llama_8b, shrunk, vit_b32

TOP = 3
PEER_MATRICES = 4  # of every shape; all of them take as many times as long


def cases(bench: Bench) -> Iterator[Case]:
    experts, small, large = 8, vit_b32(), llama_8b()
    if bench.tiny:
        experts, small, large = 2, shrunk(small), shrunk(large)
    yield vit(bench, small * experts)
    yield llama(bench, large)


def worst(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest error of a singular value, relative to the matrix's largest."""
    return max(float(((s.double() - e).abs() / e[0]).max()) for s, e in zip(ours, exact))


def vit(bench: Bench, shapes: list) -> Case:
    sets = [[bench.randn(*shape) for shape in shapes] for _ in range(1 if bench.tiny else 2)]
    mats = sets[0]
    where = {shape: [i for i, other in enumerate(shapes) if other == shape] for shape in set(shapes)}
    chosen = {shape: indices[:PEER_MATRICES] for shape, indices in where.items()}
    stacks = [torch.stack([mats[i] for i in indices]) for indices in chosen.values()]
    exact = [s for stack in stacks for s in largest(stack)]
    order = [i for indices in chosen.values() for i in indices]
    scale = work(shapes) / work([shapes[i] for i in order])

    def flat(values) -> list[torch.Tensor]:
        return [s[:TOP] for stack in values for s in stack]

    candidates = {
        "ours": Candidate(
            [lambda m=m: topk_svd(m, TOP, tol=1e-3).S for m in sets], lambda s: worst([s[i] for i in order], exact)
        ),
        "svdvals": Candidate(
            [lambda: [torch.linalg.svdvals(stack) for stack in stacks]], lambda s: worst(flat(s), exact), scale=scale
        ),
    }
    if importlib.util.find_spec("cupy") is not None and bench.device.type == "cuda":
        import cupy

        arrays = [cupy.from_dlpack(stack) for stack in stacks]
        candidates["cupy"] = Candidate(
            [lambda: [cupy.linalg.svd(array, compute_uv=False) for array in arrays]],
            lambda s: worst(flat([torch.from_dlpack(x) for x in s]), exact),
            scale=scale,
        )
    numel = sum(m.numel() for m in mats)
    return Case(
        "topk_svd",
        f"{len(shapes)} weights of ViT-B/32s, fp32, k = {TOP}, tol 1e-3",
        candidates,
        bytes=4.0 * numel,  # one pass; the share is of one pass
        bar=("svdvals", 100),
    )


def work(shapes: list) -> int:
    """What a full decomposition of matrices of these shapes costs, up to a factor."""
    return sum(min(shape) * torch.Size(shape).numel() for shape in shapes)


def llama(bench: Bench, shapes: list) -> Case:
    mats = [bench.randn(*shape, dtype=torch.bfloat16) for shape in shapes]
    some = [i for i, shape in enumerate(shapes) if max(shape) <= 14336][:3]
    exact = [largest(mats[i].unsqueeze(0))[0] for i in some]
    return Case(
        "topk_svd",
        f"{len(shapes)} weights of an 8 B Llama, bf16, k = {TOP}, tol 1e-3",
        {"ours": Candidate([lambda: topk_svd(mats, TOP, tol=1e-3).S], lambda s: worst([s[i] for i in some], exact))},
        bytes=2.0 * sum(m.numel() for m in mats),
    )


def largest(stack: torch.Tensor) -> torch.Tensor:
    """The largest singular values [.., TOP] in float64: of these, the eigenvalues of a Gram matrix lose nothing."""
    x = stack.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    return torch.linalg.eigvalsh(gram).flip(-1)[..., :TOP].clamp_min(0).sqrt()
