"""The routes that whole merges are timed by compute the same thing."""

from __future__ import annotations

import mmap

import merges
import problems
import pytest
import torch

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(problems, "VIT_SHAPE", TINY)


@pytest.mark.parametrize(
    "route, kind", [("statsmerge", "ridge"), ("statsmerge, ridge=0", "pinv"), ("plain torch", "pinv")]
)
def test_lot(route, kind):
    routes = merges.CASES["lot_vit"][1]
    exact = routes["exact"](merges.vit(8))()
    merged = routes[route](merges.vit(8))()
    assert merged.keys() == merges.vit(1).base.keys()
    assert merges.output_error(merged, exact, kind) < 1e-3
    assert merges.output_error(merges.vit(1).base, exact, kind) > 0.1


@pytest.mark.parametrize("route", ["statsmerge", "graph a task", "graph kept"])
def test_step(route):
    make_problem, routes = merges.CASES["step_1"]
    exact = routes["exact"](make_problem())()["gradient"]
    gradient = routes[route](make_problem())()["gradient"]
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_floors_of_a_step_have_the_same_gradient():
    gradients = []
    for together in (False, True):
        step = merges.step(1)
        merges.ForwardBackward(step, together=together)()
        gradients.append(step.problem.model.encoder.layers[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_memory_is_that_of_the_run():
    held = merges.resident("VmRSS")
    merges.reset_peak()
    with mmap.mmap(-1, 2**28) as memory:  # from the system, whatever torch's allocator has kept of earlier tensors
        for page in range(0, 2**28, mmap.PAGESIZE):
            memory[page] = 1
    assert 0.99 * 2**28 <= merges.resident("VmHWM") - held < 2**29  # other memory may be given back meanwhile
