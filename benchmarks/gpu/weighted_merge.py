"""weighted_merge and its gradient: bound by memory, so judged by the share of the copy's bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from statsmerge_ext.ops import QuantizedTensor, prepare_task_vectors, weighted_merge

from .measuring import Bench, Candidate, Case, relative_error
from .models import llama_8b, shrunk, vit_b32, vit_b32_vectors

CHECKED = 1_000_000  # elements of some tensors that are computed again in float64


def cases(bench: Bench) -> Iterator[Case]:
    large, small = llama_8b(), vit_b32() + vit_b32_vectors()
    if bench.tiny:
        large, small = shrunk(large), shrunk(small)
    yield from dense(bench, "8 B parameters, bf16, K = 4", large, 4, torch.bfloat16, ("ceiling", 0.8))
    yield from dense(bench, "ViT-B/32, fp32, K = 8", small, 8, torch.float32, None)
    yield quantised(bench, large[: len(large) // 4], 8)


def dense(bench: Bench, name: str, shapes: list, tasks: int, dtype: torch.dtype, bar) -> Iterator[Case]:
    base = [bench.randn(*shape, dtype=dtype) for shape in shapes]
    taus = [[bench.randn(*shape, dtype=dtype) for shape in shapes] for _ in range(tasks)]
    coefficients = torch.rand(len(shapes), tasks, device=bench.device) - 0.3
    numel = sum(b.numel() for b in base)
    some = sorted({0, len(shapes) // 2, len(shapes) - 1})

    def merge_error(merged) -> float:
        ours = [merged[l].flatten()[-CHECKED:] for l in some]
        exact = []
        for l in some:
            total = base[l].flatten()[-CHECKED:].double()
            for k in range(tasks):
                total = total + coefficients[l, k].double() * taus[k][l].flatten()[-CHECKED:].double()
            exact.append(total)
        return relative_error(torch.cat(ours), torch.cat(exact))

    def foreach():
        merged = [b.clone() for b in base]
        for k in range(tasks):
            for l in range(len(shapes)):
                merged[l].add_(taus[k][l], alpha=factors[l][k])
        return merged

    factors, prepared = coefficients.tolist(), prepare_task_vectors(taus, base)
    yield Case(
        "weighted_merge",
        name,
        {
            "ours": Candidate([lambda: weighted_merge(base, prepared, coefficients)], merge_error),
            "add_": Candidate([foreach], merge_error),
        },
        bytes=(tasks + 2) * numel * base[0].element_size(),
        bar=bar,
    )

    def gradient_error(gradient) -> float:
        exact = [(base[l].flatten().double() @ taus[k][l].flatten().double()) for l in some[1:] for k in range(tasks)]
        return relative_error(gradient[some[1:]].flatten(), torch.stack(exact))

    def dots():
        rows = [torch.stack([(b.flatten() @ row[l].flatten()) for row in taus]) for l, b in enumerate(base)]
        return torch.stack(rows)

    yield Case(
        "weighted_merge",
        f"gradient, {name}",
        {
            "ours": Candidate(
                [lambda: torch.ops.statsmerge.weighted_merge_grad(base, *prepared.operands)], gradient_error
            ),
            "dot": Candidate([dots], gradient_error),
        },
        bytes=(tasks + 1) * numel * base[0].element_size(),
    )


def quantised(bench: Bench, shapes: list, tasks: int, bits: int = 4, group: int = 128) -> Case:
    def random_codes(shape) -> QuantizedTensor:
        numel = torch.Size(shape).numel()
        codes = torch.empty(-(-numel // 8) * bits, dtype=torch.uint8, device=bench.device).random_()
        scale = torch.rand(-(-numel // group), device=bench.device)
        zero_point = torch.randint(0, 16, scale.shape, dtype=torch.int32, device=bench.device)
        return QuantizedTensor(codes, scale, zero_point, bits, group, torch.Size(shape))

    base = [bench.randn(*shape, dtype=torch.bfloat16) for shape in shapes]
    taus = [[random_codes(shape) for shape in shapes] for _ in range(tasks)]
    coefficients = torch.rand(tasks, device=bench.device)
    factors = coefficients.tolist()

    def one(l: int, dtype: torch.dtype):
        total = base[l].to(dtype)
        for k in range(tasks):
            total = total + factors[k] * taus[k][l].dequantize(dtype)
        return total

    def error(merged) -> float:
        smallest = min(range(len(shapes)), key=lambda l: base[l].numel())
        return relative_error(merged[smallest], one(smallest, torch.float64))

    numel, prepared = sum(b.numel() for b in base), prepare_task_vectors(taus, base)
    return Case(
        "weighted_merge",
        f"{numel / 1e9:.1f} B parameters, bf16, K = {tasks} of {bits} bits",
        {
            "ours": Candidate([lambda: weighted_merge(base, prepared, coefficients)], error),
            "dequantise": Candidate([lambda: [one(l, torch.float32).bfloat16() for l in range(len(shapes))]], error),
        },
        bytes=numel * (4 + tasks * bits / 8 * (1 + 8 / group / (bits / 8))),
    )
