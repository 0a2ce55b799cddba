"""gram_accumulate_ beside cuBLAS, which computes both triangles; gram_accumulate_patches_ beside unfolding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from statsmerge_ext.ops import gram_accumulate_, gram_accumulate_patches_
from statsmerge_ext.ops.gram import unfold_patches

from .measuring import Bench, Candidate, Case, relative_error


def cases(bench: Bench) -> Iterator[Case]:
    tokens = 128 if bench.tiny else 32768
    for d in (32,) if bench.tiny else (4096, 8192, 1024):
        yield case(bench, tokens, d, torch.bfloat16)
    for d in (32,) if bench.tiny else (4096, 8192):
        yield case(bench, tokens, d, torch.float32)
    images = 2 if bench.tiny else 32
    yield patches(bench, (images, 6 if bench.tiny else 768, 28, 28), torch.float32, depthwise=True)
    for dtype in (torch.bfloat16, torch.float32):
        yield patches(bench, (4 * images, 6 if bench.tiny else 256, 14, 14), dtype, depthwise=False)


def case(bench: Bench, tokens: int, d: int, dtype: torch.dtype) -> Case:
    xs = [bench.randn(tokens, d, dtype=dtype) for _ in range(3)]
    gram = torch.zeros(d, d, device=bench.device)
    columns = min(d, 256)
    exact = torch.cat([xs[0].double().T @ xs[0][:, c].double() for c in (slice(columns), slice(d - columns, d))], 1)

    def error(result: torch.Tensor) -> float:
        ours, theirs = result[:, :columns].tril(), exact[:, :columns].tril()
        last = result[-columns:, -columns:].tril(), exact[-columns:, columns:].tril()
        return max(relative_error(ours, theirs), relative_error(*last))

    half = dtype == torch.bfloat16 and bench.device.type == "cuda"
    options = {"out_dtype": torch.float32} if half else {}
    return Case(
        "gram_accumulate_",
        f"{str(dtype).removeprefix('torch.')}, {tokens} × {d}",
        {
            "ours": Candidate([lambda x=x: gram_accumulate_(gram, x) for x in xs], error, reset=gram.zero_),
            "mm": Candidate([lambda x=x: torch.mm(x.T, x, **options) for x in xs], error),
        },
        bytes=tokens * d * xs[0].element_size() + d * (d + 1) * 4,
        flops=tokens * d * (d + 1),
        rate="bf16" if dtype == torch.bfloat16 else "fp32",
        bar=("mm", 1.5) if d >= 4096 else None,
    )


def patches(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype, depthwise: bool) -> Case:
    """A convolution of 3 × 3 that keeps its input's size."""
    groups = shape[1] if depthwise else 1
    columns, tokens = shape[1] // groups * 9, shape[0] * shape[2] * shape[3]
    xs = [bench.randn(*shape, dtype=dtype) for _ in range(3)]
    gram = torch.zeros(groups, columns, columns, device=bench.device)

    def unfolded(x: torch.Tensor) -> torch.Tensor:
        return unfold_patches(x, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups)

    exact = torch.stack([p.double().T @ p.double() for p in unfolded(xs[0])[:8]]).tril()

    half = dtype == torch.bfloat16 and bench.device.type == "cuda"
    options = {"out_dtype": torch.float32} if half else {}

    def multiplied(x: torch.Tensor) -> torch.Tensor:
        rows = unfolded(x) if half else unfolded(x).float()
        return torch.bmm(rows.mT, rows, **options)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return gram_accumulate_patches_(gram, x, 3, padding=1, groups=groups)

    return Case(
        "gram_accumulate_patches_",
        f"{str(dtype).removeprefix('torch.')}, {' × '.join(map(str, shape))}, {groups} groups",
        {
            "ours": Candidate(
                [lambda x=x: ours(x) for x in xs], lambda g: relative_error(g[:8].tril(), exact), reset=gram.zero_
            ),
            "unfold, bmm": Candidate(
                [lambda x=x: multiplied(x) for x in xs], lambda g: relative_error(g[:8].tril(), exact)
            ),
        },
        bytes=xs[0].numel() * xs[0].element_size() + gram.numel() * 4,
        flops=groups * tokens * columns * (columns + 1),
        rate="bf16" if dtype == torch.bfloat16 else "fp32",
    )
