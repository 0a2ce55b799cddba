"""Sums over inputs that several layers read: what they give, and how long they last."""

from __future__ import annotations

import pytest
import torch

from statsmerge_ext.engine import layer_by_layer
from statsmerge_ext.engine.shared_inputs import SharedInputs
from statsmerge_ext.evidence.observe import Observation
from tests.execution_order import Encoder, compensate, inputs


def observed(x: torch.Tensor, view=()) -> Observation:
    return Observation((), x, view, lambda: x)


def pairs_of(*shapes) -> list:
    return [tuple(observed(torch.randn(shape)) for _ in range(2)) for shape in shapes]


def rows_of(pairs, weights=None):
    for place, (own, now) in enumerate(pairs):
        yield now.input, own.input, weights and weights[place]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_moments_of_what_an_expert_makes_of_its_inputs(weighted, shifted):
    torch.manual_seed(0)
    pairs = pairs_of((5, 30, 6), (2, 30, 6))
    weights = [torch.rand(5, 30), torch.rand(2, 30)] if weighted else None
    w, b = torch.randn(1, 9, 6), torch.randn(9) if shifted else None
    shared = SharedInputs()
    assert shared.are_worth_summing(pairs, w)
    ours = shared.moments(pairs, rows_of(pairs, weights), w, b)

    def sums(dtype):
        x, y = (torch.cat([pair[i].input.flatten(0, 1) for pair in pairs]).to(dtype) for i in (1, 0))
        y = y @ w[0].T.to(dtype) + (0 if b is None else b.to(dtype))
        f = (
            torch.cat([f.flatten() for f in weights]).to(dtype)[:, None]
            if weighted
            else torch.ones(210, 1, dtype=dtype)
        )
        return {
            "gram": x.T @ (f * x),
            "product": (f * y).T @ x,
            "inputs": (f * x).sum(0),
            "outputs": (f * y).sum(0),
            "count": f.sum(),
        }

    exact, plain = sums(torch.float64), sums(torch.float32)
    for name, expected in exact.items():
        found = getattr(ours, name).squeeze(0) if name != "count" else ours.count
        error, of_plain = ((found - expected).norm(), (plain[name] - expected).norm())
        assert error <= 2 * of_plain + 1e-6 * expected.norm(), name


def test_the_same_tensors_are_summed_once():
    pairs = pairs_of((40, 4), (40, 4))
    shared, w = SharedInputs(), torch.randn(1, 4, 4)
    assert shared.are_worth_summing(pairs, w)
    first = shared.moments(pairs, rows_of(pairs), w, None)
    narrow, again = torch.randn(1, 1, 4), [tuple(observed(seen.input) for seen in pair) for pair in pairs]
    assert shared.are_worth_summing(again, narrow)
    second = shared.moments(again, iter(()), narrow, None)
    assert second.gram is first.gram
    x, y = (torch.cat([pair[i].input for pair in pairs]) for i in (1, 0))
    torch.testing.assert_close(second.product[0], narrow[0] @ y.T @ x)


def changed_in_place(pairs):
    pairs[1][0].input.mul_(2)
    return pairs


CHANGES = {
    "other tensors of the same content": lambda pairs: [tuple(observed(o.input.clone()) for o in p) for p in pairs],
    "changed in place": changed_in_place,
    "cut in another way": lambda pairs: [(pairs[0][0], observed(pairs[0][1].input, view=(1,))), pairs[1]],
    "fewer": lambda pairs: pairs[:1],
    "an expert that is not there": lambda pairs: [(None, pairs[0][1]), pairs[1]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_are_summed_anew(change):
    pairs = pairs_of((40, 4), (40, 4))
    shared, w = SharedInputs(), torch.randn(1, 4, 4)
    shared.are_worth_summing(pairs, w)
    first = shared.moments(pairs, rows_of(pairs), w, None)
    other = CHANGES[change](pairs)
    shared.are_worth_summing(other, w)
    rows = [(now.input, (own or now).input, None) for own, now in other]
    second = shared.moments(other, iter(rows), w, None)
    assert second.gram is not first.gram
    torch.testing.assert_close(second.product[0], w[0] @ sum(y.T @ x for x, y, _ in rows))


def test_outputs_are_formed_where_that_is_cheaper():
    w = torch.randn(1, 16, 64)  # many inputs, few outputs
    assert not SharedInputs().are_worth_summing(pairs_of((1000, 64)), w)
    assert SharedInputs().are_worth_summing(pairs_of((1000, 64)), torch.randn(1, 64, 64))
    assert not SharedInputs().are_worth_summing(pairs_of((8, 64)), torch.randn(1, 64, 64))  # fewer rows than inputs


def test_queries_keys_and_values_read_the_same(monkeypatch):
    torch.manual_seed(0)
    base, experts = Encoder(), {name: Encoder() for name in ("a", "b")}
    data = {name: x for name, x in inputs(6, 10, 8).items() if name in experts}
    summed, features = [], layer_by_layer._features
    monkeypatch.setattr(
        layer_by_layer,
        "_features",
        lambda call, *rest: (summed.append(call.now.layers[0].name), features(call, *rest))[1],
    )
    compensate(base, experts, data)
    counts = {name: summed.count(f"{name}.weight") for name in ("attention.q", "attention.k", "attention.v", "up")}
    assert counts["attention.q"] == counts["up"] > 0
    assert counts["attention.k"] == counts["attention.v"] == 0
