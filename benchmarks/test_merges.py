"""Whole merges and whole training steps, each route in a process of its own (see merges.py).

Peak memory is counted from what the process held when the models and samples were ready.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import merges
import problems
import pytest
import torch
from harness import OURS, Bar, Route, relative_error

ABOVE = "MiB above the inputs"


class Child:
    """One route of one case: set up by :meth:`start`, run by :meth:`run`; it saves its result after the run."""

    def __init__(self, case: str, route: str, folder: Path) -> None:
        self.route, self.path = route, folder / f"{route}.pt"
        self.command = [sys.executable, merges.__file__, case, route, str(self.path)]
        self.process: subprocess.Popen | None = None
        self.facts: dict[str, int] = {}

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._line() != "ready\n":
            pass

    def run(self) -> Child:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.facts = json.loads(self._line())
        return self

    def result(self) -> dict | None:
        """What the last run computed, once it is saved."""
        self.process.wait()
        return torch.load(self.path)

    def memory(self) -> dict[str, float]:
        """Of the last run, in MiB."""
        held, peak = (self.facts[name] / 2**20 for name in ("held", "peak"))
        return {ABOVE: peak - held, "MiB in all": peak}

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with status {self.process.wait()}")
        return line


def exact_result(case: str, folder: Path) -> dict:
    child = Child(case, "exact", folder)
    child.start()
    return child.run().result()


def routes_of(case: str, folder: Path, slow: int | None) -> dict[str, Route]:
    """Every route but the exact one; all but ours take part in ``slow`` rounds."""
    children = {name: Child(case, name, folder) for name in merges.CASES[case][1] if name != "exact"}
    return {
        name: Route(child.run, prepare=child.start, rounds=None if name == OURS else slow)
        for name, child in children.items()
    }


def lot_errors(exact: dict) -> Callable[[Child], dict[str, float]]:
    def errors(child: Child) -> dict[str, float]:
        state = child.result()
        if state is None:
            return child.memory()
        kind = "ridge" if child.route == OURS else "pinv"  # each route against what it is to compute
        return {"error": merges.output_error(state, exact, kind), **child.memory()}

    return errors


@pytest.mark.parametrize("model", ["vision8", pytest.param("vit", marks=pytest.mark.long)])
def test_lot(case, tmp_path, model):
    name = f"lot_{model}"
    exact = exact_result(name, tmp_path)
    title = {"vision8": "LOT on vision8 (EfficientNet-Lite0)", "vit": "LOT of a ViT-B/32's shape"}[model]
    case(
        f"{title}, K = {problems.TASKS}, {problems.SAMPLES} samples a task",
        routes_of(name, tmp_path, slow=2 if model == "vision8" else 1),
        errors=lot_errors(exact),
        bound=1e-3,
        rounds=2,
        bars=(Bar("plain torch", 4), *([Bar("plain torch", 3, of=ABOVE)] if model == "vit" else [])),
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("samples", [1, pytest.param(4, marks=pytest.mark.long)])
def test_step(case, tmp_path, samples, autocast):
    name = f"step_{samples}{'_autocast' * autocast}"
    exact = exact_result(name, tmp_path)["gradient"]

    def errors(child: Child) -> dict[str, float]:
        state = child.result()
        if state is None:
            return child.memory()
        return {"error": relative_error(state["gradient"], exact), **child.memory()}

    case(
        f"StatsMerging step, ViT-B/32's shape, K = {problems.TASKS}, {samples} sample{'s' * (samples > 1)} a task"
        + ", autocast to bfloat16" * autocast,
        routes_of(name, tmp_path, slow=1),
        errors=errors,
        bound=0.1 if autocast else 1e-4,  # bfloat16 products, in every route alike
        rounds=2,
        bars=(Bar("graph a task", 3),),
    )


@pytest.mark.parametrize("storage", ["full", "bfloat16", "int8", "int4"])
def test_memory_of_a_step(benchmark, tmp_path, storage):
    """Base, merged weights, gradient and stored task vectors are needed; all else is activations of one sample, one
    layer's temporary gradient and torch's own scratch, which do not grow with the number of experts."""
    child = Child(f"memory_{storage}", OURS, tmp_path)
    child.start()
    benchmark.pedantic(child.run)
    result = child.result()
    taken = child.facts["peak"] - result["held"]
    benchmark.extra_info.update(storage=storage, needed=result["bytes"], taken=taken)
    assert taken <= result["bytes"] + 256 * 2**20
