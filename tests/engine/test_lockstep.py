"""Forward passes side by side."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from statsmerge_ext.engine.lockstep import lockstep
from statsmerge_ext.layers import find_layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 2)).eval()


def run(passes, layers, forward=lambda model, x: model(x)):
    return list(lockstep(passes, layers, forward))


def test_all_passes_stop_at_every_layer_with_their_own_inputs():
    models = [network(), network().double()]
    xs = [torch.randn(3, 4), torch.randn(7, 4, dtype=torch.float64)]
    steps = run(list(zip(models, xs, strict=True)), find_layers(models[0]))
    assert [step.layers[0].name for step in steps] == ["0.weight", "2.weight", "3.weight", "4.weight"]
    for model, x, seen in zip(models, xs, zip(*(step.arrivals for step in steps), strict=True), strict=True):
        for observation, end in zip(seen, (0, 2, 3, 4), strict=True):
            if end != 3:
                assert torch.equal(observation.features(), model[:end](x))


def test_a_weight_changed_between_steps_is_seen_by_the_passes_that_wait():
    model, x = network(), torch.randn(3, 4)
    outputs = {}
    passes = [(model, x), (model, 2 * x[:2])]
    for step in lockstep(passes, find_layers(model), lambda m, b: outputs.update({len(b): m(b)})):
        with torch.no_grad():
            model.get_parameter(step.layers[0].parameter).mul_(2)
    assert torch.equal(outputs[3], model(x)) and torch.equal(outputs[2], model(2 * x[:2]))


def test_passes_at_different_layers_go_on_in_the_order_of_the_layers():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.c(self.b(x) if x.sum() > 0 else self.a(x))

    model = Routed()
    steps = run([(model, torch.ones(1, 2)), (model, -torch.ones(1, 2))], find_layers(model))
    assert [(s.layers[0].name, [a is not None for a in s.arrivals]) for s in steps] == [
        ("a.weight", [False, True]),
        ("b.weight", [True, False]),
        ("c.weight", [True, True]),
    ]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_more_passes_run_at_a_time_than_there_are_threads(threads):
    before, running, most = torch.get_num_threads(), set(), []

    def forward(model, x):
        for layer in model:  # a pass that waits at a layer has left the set
            running.add(len(x))
            most.append((len(running), torch.get_num_threads()))
            time.sleep(0.005)
            running.discard(len(x))
            x = layer(x)

    try:
        torch.set_num_threads(threads)
        run([(network(), torch.ones(rows, 4)) for rows in (1, 2, 3)], find_layers(network()), forward)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert max(count for count, _ in most) <= min(threads, 3)
    assert {share for _, share in most} == {max(1, threads // 3)}


def test_an_error_in_a_pass_is_raised_and_no_thread_is_left():
    def forward(model, x):
        model(x)
        if len(x) == 2:
            raise KeyError("mine")

    model, before = network(), threading.active_count()
    with pytest.raises(KeyError, match="mine"):
        run([(model, torch.ones(1, 4)), (model, torch.ones(2, 4))], find_layers(model), forward)
    assert threading.active_count() == before


def test_an_abandoned_run_leaves_no_thread_and_no_hook():
    model, before = network(), threading.active_count()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    steps = lockstep([(model, torch.ones(1, 4))] * 3, find_layers(model), lambda m, x: m(x))
    next(steps)
    assert threading.active_count() == before + 3
    steps.close()
    assert threading.active_count() == before
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_fast_attention_kernels_are_back_after_a_run():
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    torch.backends.mha.set_fastpath_enabled(True)
    steps = run([(model, torch.randn(2, 3, 8)), (model, torch.randn(1, 5, 8))], find_layers(model))
    assert len(steps) == 8
    assert torch.backends.mha.get_fastpath_enabled()
