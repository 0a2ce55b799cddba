"""How a case is measured: its routes interleaved on the same tensors, each result judged, each floor stated.

pytest-benchmark times our own route; between its rounds, in the setup, the peers take their turns. Everything goes into
the JSON that pytest-benchmark writes: our rounds as its own data, the peers' in ``extra_info``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata

import target
import torch
from torch import Tensor

from statsmerge_ext import _C
from statsmerge_ext.memory import keep_freed_memory

OURS = "statsmerge"
#: More than any last-level cache that the suite is likely to meet.
_EVICTION = torch.zeros(32 * 2**20)
#: Seconds before every run, in which the last route's threads stop spinning: scipy brings a pool of its own, and two of
#: them on the same cores slow each other down by an order of magnitude.
_PAUSE = 0.05

# All routes run in a process that keeps what it frees: else the first touch of results is much of what is timed.
keep_freed_memory()
if target.TARGET != "native":
    _C.set_cpu_target(target.TARGET)


@dataclass(frozen=True)
class Work:
    """The least that a route has to do, from which its floor follows.

    Attributes:
        read, written: bytes that have to pass between memory and processor.
        flops: floating-point operations.
        dtype: the arithmetic whose measured rate bounds them: "float32", "float64" or "bfloat16".
    """

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    dtype: str = "float32"


@dataclass(frozen=True)
class Route:
    """One way to compute a case's result.

    Attributes:
        run: the timed call; its result is what is judged.
        work: its floor, or a function of the result for a route that decides itself how much to do.
        prepare: called before every run, untimed.
        rounds: take part in so many rounds only and without a warm-up: for routes that take many seconds.
    """

    run: Callable[[], object]
    work: Work | Callable[[object], Work] | None = None
    prepare: Callable[[], object] | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Bar:
    """What our route has to reach: ``peer`` takes so many times its time, or has so many times what it is ``of``."""

    peer: str
    at_least: float
    towards: float | None = None
    of: str = "seconds"


def compare(
    benchmark,
    case: str,
    routes: Mapping[str, Route],
    *,
    errors: Callable[[object], Mapping[str, float]],
    bound: float,
    rounds: int = 7,
    warm: bool = False,
    bars: tuple[Bar, ...] = (),
) -> None:
    """Measure all ``routes`` of a case in turns and record what each took and how wrong it was.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: its name.
        routes: name -> route; the first is :data:`OURS`.
        errors: a result's errors by name, against float64; the one called "error" is the one that is bounded.
        bound: how large our "error" may be, in the first run and in the last.
        rounds: timed rounds, after one that warms up.
        warm: run each route once, untimed, just before it is timed; otherwise the caches are emptied.
        bars: of this case.
    """
    peers = [name for name in routes if name != OURS]
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    results: dict[str, object] = {}
    judged: dict[str, list[Mapping[str, float]]] = {name: [] for name in routes}
    turn = 0

    def prepare(name: str) -> None:
        results.pop(name, None)
        route = routes[name]
        time.sleep(_PAUSE)
        if warm:
            if route.prepare:
                route.prepare()
            route.run()
        else:
            _EVICTION.add_(1.0)
        if route.prepare:
            route.prepare()

    def judge() -> None:
        for name, result in results.items():
            judged[name].append(dict(errors(result)))

    def take_turns() -> None:
        """Let the peers run, in the other direction every time; then make ready for our own route."""
        nonlocal turn
        if turn == 1:
            judge()
        for name in peers if turn % 2 == 0 else reversed(peers):
            route = routes[name]
            if route.rounds is not None and len(seconds[name]) >= route.rounds:
                continue
            prepare(name)
            start = time.perf_counter()
            results[name] = route.run()
            elapsed = time.perf_counter() - start
            if turn or route.rounds is not None:
                seconds[name].append(elapsed)
        turn += 1
        prepare(OURS)

    def ours() -> None:
        results[OURS] = routes[OURS].run()

    benchmark.pedantic(ours, setup=take_turns, rounds=rounds, warmup_rounds=1)
    judge()
    for found in judged[OURS]:
        error = found.get("error", 0.0)  # none where the case says that there is nothing to judge it by
        assert error <= bound, f"{case}: error {error:.2g}, at most {bound:.2g} was expected"
    benchmark.extra_info.update(
        case=case,
        caches="warm" if warm else "cold",
        bars=[asdict(bar) for bar in bars],
        routes={
            name: {
                "seconds": seconds.get(name, []),
                "errors": judged[name][-1],
                "work": _work_of(route, results[name]),
            }
            for name, route in routes.items()
        },
    )


def _work_of(route: Route, result: object) -> dict | None:
    work = route.work(result) if callable(route.work) else route.work
    return None if work is None else asdict(work)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference from ``exact`` (float64) over its own."""
    return float((value.double() - exact).norm() / exact.norm())


def has_package(name: str) -> bool:
    """Whether a distribution that holds an optional peer is installed."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
