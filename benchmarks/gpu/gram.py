"""gram_accumulate_ beside cuBLAS, which computes both triangles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from statsmerge_ext.ops import gram_accumulate_

from .measuring import Bench, Candidate, Case, relative_error


def cases(bench: Bench) -> Iterator[Case]:
    tokens = 128 if bench.tiny else 32768
    for d in (32,) if bench.tiny else (4096, 8192, 1024):
        yield case(bench, tokens, d, torch.bfloat16)
    for d in (32,) if bench.tiny else (4096, 8192):
        yield case(bench, tokens, d, torch.float32)


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
