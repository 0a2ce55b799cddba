"""How a case is timed and judged, the same for every operator."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

L2_BYTES = 256 << 20  # written between calls to empty the cache: several times the largest
ROUNDS = 15
CASE, SLOW = 2000.0, 1500.0  # milliseconds: of one candidate's rounds, about; and above which a call is not repeated


@dataclass
class Candidate:
    """One way to do what a case asks for.

    calls: the same work on different buffers, so that none is found in the cache by chance; called in turn
    error: of a call's result, against float64
    reset: what has to be done before a call whose result is judged
    scale: how often the measured part is contained in the whole case, for peers too slow to be run on all of it
    """

    calls: list[Callable[[], Any]]
    error: Callable[[Any], float]
    reset: Callable[[], None] = lambda: None
    scale: float = 1.0


@dataclass
class Case:
    """bytes and flops: the least that has to be moved and computed; rate: the ceiling that flops are held against.

    bar: a peer's name (or "ceiling") and the speed-up (or the share of the ceiling) that is asked for
    """

    operator: str
    name: str
    candidates: dict[str, Candidate]
    bytes: float = 0
    flops: float = 0
    rate: str = "bf16"
    bar: tuple[str, float] | None = None


@dataclass
class Bench:
    device: torch.device
    tiny: bool
    out: Path
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        self.flushed = torch.empty(1 if self.tiny else L2_BYTES, dtype=torch.uint8, device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_()

    def once(self, call: Callable[[], Any], cold: bool) -> tuple[float, Any]:
        """Milliseconds of one call, and what it returned."""
        if cold:
            self.flushed.fill_(1)
        if self.device.type == "cpu":
            start = time.perf_counter()
            result = call()
            return (time.perf_counter() - start) * 1e3, result
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), result

    def judge(self, candidate: Candidate) -> float:
        """The error of a call into memory that held NaN before."""
        poison(candidate.calls[0], self.device)
        candidate.reset()
        return candidate.error(candidate.calls[0]())

    def measure_ceilings(self) -> None:
        def milliseconds(call: Callable[[], Any]) -> float:
            return statistics.median([self.once(call, cold=False)[0] for _ in range(8)][3:])

        size = 1 << 10 if self.tiny else 1 << 31
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        self.ceilings["copy_bytes"] = 2 * size / (milliseconds(partial(target.copy_, source)) * 1e-3)
        n = 64 if self.tiny else 8192
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)):
            product = partial(torch.mm, self.randn(n, n, dtype=dtype), self.randn(n, n, dtype=dtype))
            self.ceilings[f"{name}_flops"] = 2 * n**3 / (milliseconds(product) * 1e-3)

    def run(self, case: Case) -> None:
        """Time a case's candidates in alternation, warm and with an emptied cache, and judge them before and after.

        What takes longer than SLOW is called once.
        """
        results: dict[str, dict[str, Any]] = {}
        for name, candidate in case.candidates.items():
            try:
                candidate.reset()
                first, value = self.once(candidate.calls[0], cold=False)
                result = {"scale": candidate.scale, "error_before": candidate.error(value)}
                del value
                if first < SLOW:
                    result["error_before"] = self.judge(candidate)
                    first = self.once(candidate.calls[0], cold=False)[0]
                result["estimate"] = first
                results[name] = result
            except Exception as problem:  # what fails is reported; the others are still measured
                results[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        running = {name: result for name, result in results.items() if "failed" not in result}
        for temperature in ("warm", "cold"):
            times = {
                name: [] if result["estimate"] < SLOW else [result["estimate"]] for name, result in running.items()
            }
            for round_ in range(2 if self.tiny else ROUNDS):
                for name, result in running.items():
                    if result["estimate"] < SLOW and (round_ < 3 or round_ * result["estimate"] < CASE):
                        calls = case.candidates[name].calls
                        call = calls[round_ % len(calls) if temperature == "cold" else 0]
                        times[name].append(self.once(call, temperature == "cold")[0])
            for name, values in times.items():
                running[name][temperature] = summary([value * running[name]["scale"] for value in values])
        for name, result in running.items():
            if result["estimate"] < SLOW:
                result["error_after"] = self.judge(case.candidates[name])
        self.rows.append(self.row(case, results))
        self.save()

    def row(self, case: Case, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {"operator": case.operator, "case": case.name, "results": results, "bar": case.bar}
        seconds = [case.bytes / self.ceilings["copy_bytes"], case.flops / self.ceilings[f"{case.rate}_flops"]]
        row["floor_ms"] = max(seconds) * 1e3
        ours = results.get("ours", {})
        if "cold" in ours:
            row["share"] = row["floor_ms"] / ours["cold"]["median"]
            row["ratios"] = {
                name: result["cold"]["median"] / ours["cold"]["median"]
                for name, result in results.items()
                if name != "ours" and "cold" in result
            }
            if case.bar is not None:
                seen = row["share"] if case.bar[0] == "ceiling" else row["ratios"].get(case.bar[0])
                row["met"] = None if seen is None else seen >= case.bar[1]
        return row

    def save(self) -> None:
        name = "none" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        document = {"gpu": name, "torch": torch.__version__, "ceilings": self.ceilings, "rows": self.rows}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(document, indent=1))


def summary(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "q1": quartiles[0], "q3": quartiles[2], "n": len(values)}


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def poison(call: Callable[[], Any], device: torch.device) -> None:
    """Leave NaN in the memory that the allocator gives to the next call's results."""
    sizes = [(t.numel(), t.dtype) for t in tensors_of(call()) if t.is_floating_point()]
    held = [torch.full((numel,), torch.nan, dtype=dtype, device=device) for numel, dtype in sizes]
    del held


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖; NaN stays NaN."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())
