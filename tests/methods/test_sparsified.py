"""TIES and DARE in their details: thresholds, scopes, random masks."""

from __future__ import annotations

import pytest
import torch

from statsmerge_ext import merge
from statsmerge_ext.engine import thresholds
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.engine.streaming import BLOCK
from statsmerge_ext.engine.thresholds import magnitude_thresholds
from statsmerge_ext.errors import MethodError
from statsmerge_ext.layers import layers_of_state


def problem_of(task_vectors: list[dict[str, torch.Tensor]]) -> MergeProblem:
    base = {name: torch.zeros_like(tensor) for name, tensor in task_vectors[0].items()}
    experts = {str(k): state for k, state in enumerate(task_vectors)}
    return MergeProblem(layers=layers_of_state(base), base=base, experts=experts)


def values(kind: str, count: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "normal":
        return torch.randn(count, generator=generator)
    if kind == "ties":  # five values only, most of them zero
        return torch.randint(-4, 5, (count,), generator=generator).clamp_min(0).float()
    if kind == "sorted":  # what a sample from the beginning says is wrong
        return torch.arange(count, dtype=torch.float32) * 2.0**-20
    return torch.randn(count, generator=generator, dtype=torch.float64) ** 9


@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "double"])
@pytest.mark.parametrize("density", [1e-9, 0.001, 0.2, 0.5, 0.97, 1.0])
def test_thresholds_are_exact(kind, density):
    generator = torch.Generator().manual_seed(0)
    states = [
        {"one": values(kind, 3 * BLOCK + 17, generator), "two": values(kind, 100, generator).view(4, 25)}
        for _ in range(2)
    ]
    problem = problem_of(states)
    found = magnitude_thresholds(problem, problem.layers, [density, 0.3])
    for state, share, threshold in zip(states, [density, 0.3], found, strict=True):
        magnitudes = torch.cat([tensor.flatten().abs() for tensor in state.values()])
        kept = max(1, round(share * len(magnitudes)))
        assert threshold == magnitudes.sort(descending=True).values[kept - 1]


def test_a_misleading_sample_costs_sweeps_but_not_exactness(monkeypatch):
    monkeypatch.setattr(thresholds, "_SAMPLES", 3)
    monkeypatch.setattr(thresholds, "_BINS", 16)
    state = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(1)).exp()}
    problem = problem_of([state])
    for kept in (1, 2, 1000, 4999, 5000):
        (found,) = magnitude_thresholds(problem, problem.layers, [kept / 5000])
        assert found == state["w"].sort(descending=True).values[kept - 1]


def test_a_parameter_without_entries_has_no_threshold():
    base = {"w": torch.zeros(4), "empty": torch.zeros(0, 4)}
    merged = merge("ties", base=base, experts={"a": {**base, "w": torch.arange(4.0)}}, density=0.5, scope="layer").state
    assert torch.equal(merged["w"], torch.tensor([0.0, 0.0, 2.0, 3.0])) and merged["empty"].shape == (0, 4)


def test_ties_a_layer_at_a_time_is_mergekits():
    """Trimmed layer by layer, with weights in election and mean, against the formula in float64."""
    generator = torch.Generator().manual_seed(2)
    base = {"a": torch.randn(30, 20, generator=generator), "b": torch.randn(50, generator=generator)}
    experts = {
        name: {key: tensor + torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        for name in "xyz"
    }
    weights, densities = [1.0, 0.5, 0.25], [0.3, 0.5, 0.9]
    merged = merge("ties", base=base, experts=experts, weights=weights, density=densities, scope="layer").state
    summed = merge(
        "ties", base=base, experts=experts, weights=weights, density=densities, scope="layer", normalize=False
    ).state
    for key, start in base.items():
        trimmed = []
        for state, density in zip(experts.values(), densities, strict=True):
            moved = (state[key] - start).double()
            cut = moved.abs().flatten().sort(descending=True).values[round(density * moved.numel()) - 1]
            trimmed.append(moved * (moved.abs() >= cut))
        weighted = [weight * moved for weight, moved in zip(weights, trimmed, strict=True)]
        agrees = [moved.sign() == torch.stack(weighted).sum(0).sign() for moved in trimmed]
        total = sum(moved * agree for moved, agree in zip(weighted, agrees, strict=True))
        shares = sum(w * agree for w, agree in zip(weights, agrees, strict=True))
        torch.testing.assert_close(summed[key].double(), start + total, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            merged[key].double(), start + total / torch.where(shares == 0, 1, shares), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_a_share_at_random_and_scales_up_the_rest(method):
    base = {"w": torch.zeros(3, BLOCK), "v": torch.zeros(10)}
    experts = {"a": {"w": torch.ones(3, BLOCK), "v": torch.ones(10)}}
    merged = merge(method, base=base, experts=experts, density=0.25, seed=1).state["w"]
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    share = (merged != 0).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / merged.numel()) ** 0.5
    assert not torch.equal(merged[0], merged[1])
    kept = merge(method, base=base, experts=experts, density=0.25, seed=1, rescale=False).state["w"]
    assert torch.equal(kept, merged / 4)
    assert not torch.equal(merge(method, base=base, experts=experts, density=0.25, seed=2).state["w"], merged)
    assert torch.equal(merge(method, base=base, experts=experts, density=1.0).state["w"], experts["a"]["w"])


def test_dare_ties_adds_only_what_agrees():
    base = {"w": torch.zeros(1000)}
    experts = {"a": {"w": torch.full((1000,), 3.0)}, "b": {"w": torch.full((1000,), -1.0)}}
    options = {"density": 0.5, "rescale": False, "weights": 1.0}
    merged = merge("dare_ties", base=base, experts=experts, **options).state["w"]
    assert set(merged.unique().tolist()) == {-1.0, 0.0, 3.0}
    mean = merge("dare_ties", base=base, experts=experts, normalize=True, **options).state["w"]
    assert torch.equal(mean, merged)
    both = merge("dare_linear", base=base, experts=experts, **options).state["w"]
    assert set(both.unique().tolist()) == {-1.0, 0.0, 2.0, 3.0}


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"density": 0.0}, r"density: expected a number in \(0, 1\], got 0.0"),
        ({"density": [0.5, 1.5]}, r"density: expected a number in \(0, 1\], got 1.5"),
        ({"density": [0.5]}, "density: expected 2 finite numbers, one an expert"),
        ({"weights": [1, float("inf")]}, "weights: expected 2 finite numbers"),
    ],
)
def test_bad_shares_are_refused(method, hyperparameters, message):
    state = {"w": torch.ones(3)}
    with pytest.raises(MethodError, match=message):
        merge(method, base=state, experts={"a": state, "b": state}, **hyperparameters)
    with pytest.raises(MethodError, match="scope: expected one of"):
        merge("ties", base=state, experts={"a": state}, scope="row")
