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
import pytest
import torch
from harness import OURS, Bar, Route, relative_error

SCRIPT = Path(merges.__file__)


class Child:
    """One route of one case: set up by :meth:`start`, run by :meth:`run`."""

    def __init__(self, case: str, route: str, folder: Path) -> None:
        self.arguments = [case, route]
        self.path = folder / f"{route}.pt"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, str(SCRIPT), *self.arguments, str(self.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("ready")

    def run(self) -> dict:
        """{"path", "held", "peak"} of the run; the process is gone afterwards."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        facts = json.loads(self._line())
        return {"path": self.path, **facts}

    def result(self) -> dict:
        self.start()
        self.run()
        self.process.communicate()
        return torch.load(self.path)

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.arguments)} ended with status {self.process.wait()}")
        return line

    def _expect(self, word: str) -> None:
        while self._line().strip() != word:
            pass


def routes_of(case: str, folder: Path, slow: int | None) -> dict[str, Route]:
    """Every route but the exact one; all but ours take part in ``slow`` rounds."""
    names = [name for name in merges.CASES[case][1] if name != "exact"]
    children = {name: Child(case, name, folder) for name in names}
    return {
        name: Route(child.run, prepare=child.start, rounds=None if name == OURS else slow)
        for name, child in children.items()
    }


def memory(result: dict) -> dict[str, float]:
    """What was saved is complete once the process has ended."""
    return {"MiB above the inputs": (result["peak"] - result["held"]) / 2**20, "MiB in all": result["peak"] / 2**20}


def lot_errors(exact: dict) -> Callable[[dict], dict[str, float]]:
    """The largest error of the checked layers' outputs against the exact solution's."""
    keys = [key.removeprefix("exact/") for key in exact if key.startswith("exact/")]

    def errors(result: dict) -> dict[str, float]:
        state = torch.load(result["path"])
        if state is None:
            return memory(result)
        found = []
        for key in keys:
            solution, gram = exact[f"exact/{key}"], exact[f"gram/{key}"]
            ours = (state[key].double() - exact[f"base/{key}"].double()) / merges.SCALING_FACTOR
            difference = ours.reshape(solution.shape) - solution
            found.append(float(((difference @ gram) * difference).sum() / ((solution @ gram) * solution).sum()) ** 0.5)
        return {"error": max(found), **memory(result)}

    return errors


@pytest.mark.parametrize("model", ["vision8", "vit"])
def test_lot(case, tmp_path, model):
    name = f"lot_{model}"
    exact = Child(name, "exact", tmp_path).result()
    title = {"vision8": "LOT on vision8 (EfficientNet-Lite0)", "vit": "LOT of a ViT-B/32's shape"}[model]
    case(
        f"{title}, K = {merges.TASKS}, {merges.SAMPLES} samples a task",
        routes_of(name, tmp_path, slow=3 if model == "vision8" else 1),
        errors=lot_errors(exact),
        bound=1e-3,
        rounds=3 if model == "vision8" else 2,
        bars=(Bar("plain torch", 4),),
    )


@pytest.mark.parametrize("samples", [1, 16])
def test_step(case, tmp_path, samples):
    name = f"step_{samples}"
    exact = Child(name, "exact", tmp_path).result()["gradient"] if samples == 1 else None

    def errors(result: dict) -> dict[str, float]:
        state = torch.load(result["path"])
        if state is None or exact is None:
            return {"error": 0.0, **memory(result)}
        return {"error": relative_error(state["gradient"], exact), **memory(result)}

    case(
        f"StatsMerging step, ViT-B/32's shape, K = {merges.TASKS}, {samples} sample{'s' * (samples > 1)} a task",
        routes_of(name, tmp_path, slow=2),
        errors=errors,
        bound=1e-4,
        rounds=2,
        bars=(Bar("graph a task", 3),),
    )
