"""How the benchmarks measure: turns, judgement, what is recorded."""

from __future__ import annotations

import pytest
import torch
from harness import OURS, Bar, Route, Work, compare


class Benchmark:
    """pytest-benchmark's fixture as far as it is used: the real one would print its tables among the tests."""

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, *, setup, rounds, warmup_rounds) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            target()


@pytest.fixture
def session() -> Benchmark:
    return Benchmark()


class Recorder:
    """Routes that note when they run and return a given value."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def route(self, name: str, value: float = 1.0, **options) -> Route:
        def run() -> torch.Tensor:
            self.order.append(name)
            return torch.tensor(value)

        return Route(run, prepare=lambda: self.order.append(f"prepare {name}"), **options)


def distance(result: torch.Tensor) -> dict[str, float]:
    return {"error": abs(float(result) - 1.0)}


def test_routes_take_turns_in_alternating_order(session):
    recorder = Recorder()
    routes = {OURS: recorder.route("ours"), "a": recorder.route("a"), "b": recorder.route("b")}
    compare(session, "turns", routes, errors=distance, bound=0.0, rounds=3)
    runs = [name for name in recorder.order if not name.startswith("prepare")]
    assert runs == ["a", "b", "ours", "b", "a", "ours", "a", "b", "ours", "b", "a", "ours"]
    assert recorder.order[::2] == [f"prepare {name}" for name in runs]
    recorded = session.extra_info["routes"]
    assert len(recorded["a"]["seconds"]) == len(recorded["b"]["seconds"]) == 3  # the first turn only warms up
    assert recorded[OURS]["seconds"] == []


def test_a_slow_route_runs_only_so_often(session):
    recorder = Recorder()
    routes = {OURS: recorder.route("ours"), "slow": recorder.route("slow", rounds=1)}
    compare(session, "slow", routes, errors=distance, bound=0.0, rounds=3)
    assert recorder.order.count("slow") == 1
    assert len(session.extra_info["routes"]["slow"]["seconds"]) == 1


def test_a_warm_route_has_just_run(session):
    recorder = Recorder()
    routes = {OURS: recorder.route("ours"), "peer": recorder.route("peer")}
    compare(session, "warm", routes, errors=distance, bound=0.0, rounds=1, warm=True)
    assert recorder.order[:6] == ["prepare peer", "peer", "prepare peer", "peer", "prepare ours", "ours"]
    assert session.extra_info["caches"] == "warm"


@pytest.mark.parametrize("wrong_run", [0, 3])
def test_a_wrong_result_fails_in_the_first_run_and_in_the_last(session, wrong_run):
    values = [1.0] * 4
    values[wrong_run] = 2.0
    routes = {OURS: Route(lambda: torch.tensor(values.pop(0)))}
    with pytest.raises(AssertionError, match=r"wrong: error 1, at most 0\.5"):
        compare(session, "wrong", routes, errors=distance, bound=0.5, rounds=3)


def test_what_is_recorded(session):
    routes = {
        OURS: Route(lambda: torch.tensor(1.0), lambda result: Work(flops=float(result))),
        "peer": Route(lambda: torch.tensor(1.5), Work(read=4.0)),
    }
    compare(session, "facts", routes, errors=distance, bound=0.0, rounds=1, bars=(Bar("peer", 2.0),))
    facts = session.extra_info
    assert (facts["case"], facts["caches"]) == ("facts", "cold")
    assert facts["bars"] == [{"peer": "peer", "at_least": 2.0, "towards": None, "of": "seconds"}]
    assert facts["routes"][OURS]["work"]["flops"] == 1.0
    assert facts["routes"]["peer"]["work"]["read"] == 4.0
    assert facts["routes"]["peer"]["errors"] == {"error": 0.5}
