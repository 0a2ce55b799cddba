"""Hyperparameters of which every expert has its own, and perhaps every layer: weights and densities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import Layer

_NUMBERED = re.compile(r"(.*?\.|^)(\d+)\.")


@dataclass(frozen=True)
class Schedule:
    """A number that changes from layer to layer, as mergekit's recipes have it.

    Attributes:
        setting: a number; a gradient: numbers that are passed through evenly and linearly from the first block of the
            model to the last, the first of them also for what is in no block; or a list of pairs (part of a parameter's
            name or None, setting), of which the first that fits a name counts.
    """

    setting: float | tuple

    def at(self, name: str, depth: float) -> float | None:
        """Its value for a parameter at a depth from 0 to 1, or None if no filter fits."""
        if isinstance(self.setting, Real):
            return float(self.setting)
        if isinstance(self.setting[0], Real):
            place = depth * (len(self.setting) - 1)
            first = min(int(place), max(0, len(self.setting) - 2))
            last = min(first + 1, len(self.setting) - 1)
            return (1 - (place - first)) * self.setting[first] + (place - first) * self.setting[last]
        for part, setting in self.setting:
            if part is None or part in name:
                return Schedule(setting).at(name, depth)
        return None


Weights = Real | Schedule | Sequence[Real | Schedule]


def expert_weights(weights: Weights | None, problem: MergeProblem, default: float, name: str = "weights") -> Tensor:
    """``weights`` as a float64 tensor [L, K]: one stands for all experts, None for ``default``.

    Raises MethodError, which calls them ``name``, for another number of them, for values that are not finite, or for
    filters that leave a layer out.
    """
    count = len(problem.experts)
    if weights is None:
        weights = default
    if isinstance(weights, (Real, Schedule)):
        weights = [weights] * count
    schedules = [weight if isinstance(weight, Schedule) else Schedule(weight) for weight in weights]
    if len(schedules) != count or not all(isinstance(x.setting, (Real, tuple)) for x in schedules):
        raise MethodError(f"{name}: expected {count} finite numbers, one an expert, got {list(weights)}")
    depths = _depths(problem)
    rows = [[s.at(x.parameter, d) for s in schedules] for x, d in zip(problem.layers, depths, strict=True)]
    for layer, row in zip(problem.layers, rows, strict=True):
        if None in row:
            raise MethodError(f"{name}: no filter of expert {row.index(None)} fits {layer.parameter!r}")
    values = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), count)
    if not torch.isfinite(values).all():
        raise MethodError(f"{name}: expected {count} finite numbers, one an expert, got {list(weights)}")
    return values


def by_layer(layers: Sequence[Layer], values: Tensor) -> dict[Layer, list[float]]:
    """Layer → its row of ``values`` [L, K], as numbers."""
    return dict(zip(layers, values.tolist(), strict=True))


def _depths(problem: MergeProblem) -> list[float]:
    """The place of each layer's block among the model's numbered blocks, from 0 to 1; 0 for what is in none."""
    last: dict[str, int] = {}
    for match in filter(None, (_NUMBERED.match(layer.parameter) for layer in problem.model_layers)):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    found = [_NUMBERED.match(layer.parameter) for layer in problem.layers]
    return [int(match[2]) / max(1, last[match[1]]) if match else 0.0 for match in found]
