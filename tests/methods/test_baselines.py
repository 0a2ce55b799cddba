"""The baselines against their formulas, and what all methods have in common."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from statsmerge_ext import merge
from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.methods import get_method, list_methods, register_method, registry
from tests.closed_forms import fine_tuned, make_experts, relative_error


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()


def flat(state):
    return torch.cat([value.double().flatten() for value in state.values()])


def task_vectors(base, experts):
    return torch.stack([flat(e.state_dict()) - flat(base.state_dict()) for e in experts.values()])


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
def test_linear(base, weights):
    experts = make_experts(base)
    merged = merge("linear", base=base, experts=experts, weights=weights)
    share = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    models = torch.stack([flat(e.state_dict()) for e in experts.values()])
    assert relative_error(flat(merged.state), (share / share.sum()) @ models) < 1e-6
    unnormalised = merge("linear", base=base, experts=experts, weights=weights, normalize=False)
    assert relative_error(flat(unnormalised.state), share @ models) < 1e-6


def test_task_arithmetic(base):
    experts = make_experts(base)
    merged = merge("task_arithmetic", base=base, experts=experts, scaling_factor=0.4, weights=[1, 0.5, 0])
    expected = flat(base.state_dict()) + 0.4 * torch.tensor([1, 0.5, 0.0]).double() @ task_vectors(base, experts)
    assert relative_error(flat(merged.state), expected) < 1e-6
    assert merged.coefficients["tasks"] == ["a", "b", "c"]
    torch.testing.assert_close(merged.coefficients["values"][0], torch.tensor([0.4, 0.2, 0.0], dtype=torch.float64))


def test_ties(base):
    experts = make_experts(base)
    merged = merge("ties", base=base, experts=experts, density=0.3, scaling_factor=0.7)
    moved = task_vectors(base, experts)
    trimmed = torch.zeros_like(moved)
    for row, vector in zip(trimmed, moved, strict=True):
        kept = vector.abs().topk(round(0.3 * vector.numel())).indices
        row[kept] = vector[kept]
    sign = trimmed.sum(0).sign()
    agrees = (trimmed * sign > 0).double()
    expected = (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    assert relative_error(flat(merged.state), flat(base.state_dict()) + 0.7 * expected) < 1e-6


def test_ties_that_keeps_everything_of_one_expert_is_that_expert(base):
    expert = fine_tuned(base, 3)
    merged = merge("ties", base=base, experts={"a": expert}, density=1.0)
    assert relative_error(flat(merged.state), flat(expert.state_dict())) < 1e-6


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.0])
def test_regmean(base, ratio):
    experts = make_experts(base)
    x = {name: torch.randn(40, 6) for name in experts}
    merged = merge(
        "regmean",
        base=base,
        experts=experts,
        calibration={k: [v] for k, v in x.items()},
        reduce_non_diagonal_ratio=ratio,
    )
    features = [v.double() for v in x.values()]
    grams = [f.T @ f for f in features]
    shrunk = [ratio * g + (1 - ratio) * g.diagonal().diag() for g in grams]
    weights = [e[0].weight.detach().double() for e in experts.values()]
    expected = sum(w @ g for w, g in zip(weights, shrunk, strict=True)) @ torch.linalg.inv(sum(shrunk))
    assert relative_error(merged.model[0].weight, expected) < 1e-5
    mean = torch.stack([e[1].weight.detach() for e in experts.values()]).mean(0)
    assert relative_error(merged.model[1].weight, mean) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_state_dicts_keep_dtype_order_and_zero_change(base, method, dtype):
    state = {key: value.to(dtype) for key, value in base.state_dict().items()}
    state["counter"] = torch.tensor(3)
    merged = merge(method, base=state, experts={"a": dict(state), "b": dict(state)})
    assert list(merged.state) == list(state) and merged.model is None
    assert all(
        torch.equal(merged.state[key], state[key]) and merged.state[key].dtype == state[key].dtype for key in state
    )


def test_inputs_are_not_changed(base):
    experts = make_experts(base)
    before = flat(base.state_dict()).clone(), task_vectors(base, experts)
    merge("lot", base=base, experts=experts, calibration={k: [torch.randn(9, 6)] for k in experts})
    assert torch.equal(before[0], flat(base.state_dict())) and torch.equal(before[1], task_vectors(base, experts))


def test_buffers_are_averaged_or_reestimated():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    experts = make_experts(base)
    for shift, expert in enumerate(experts.values()):
        expert[1].running_mean += shift
        expert[1].num_batches_tracked += 7
    averaged = merge("linear", base=base, experts=experts).model
    torch.testing.assert_close(averaged[1].running_mean, base[1].running_mean + 1)
    assert averaged[1].num_batches_tracked == 0
    x = {name: torch.randn(50, 4) for name in experts}
    again = merge(
        "linear", base=base, experts=experts, calibration={k: [v] for k, v in x.items()}, buffers="reestimate"
    ).model
    hidden = torch.stack([again[0](v) for v in x.values()])
    torch.testing.assert_close(again[1].running_mean, hidden.mean((0, 1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1].running_var, hidden.var(1).mean(0), rtol=1e-4, atol=1e-5)
    assert again[1].momentum == base[1].momentum and not again[1].training


def test_what_has_no_evidence_takes_the_mean_and_is_reported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(4))
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x + self.token)

    base = Model()
    experts = make_experts(base)
    merged = merge(
        "lot", base=base, experts=experts, calibration={k: [torch.randn(9, 4)] for k in experts}, scaling_factor=1.0
    )
    assert merged.report["layers"]["bare_parameters"] == ["token"]
    assert merged.report["layers"]["never_called"] == ["unused.weight"]
    for name in ("token", "unused.weight"):
        mean = torch.stack([e.get_parameter(name).detach() for e in experts.values()]).mean(0)
        torch.testing.assert_close(merged.model.get_parameter(name).detach(), mean)


def test_tied_weights_are_merged_once():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=20)).eval()
    experts = make_experts(model)
    batches = {name: [{"input_ids": torch.randint(0, 50, (3, 8))}] for name in experts}
    merged = merge("lot", base=model, experts=experts, calibration=batches)
    assert merged.model.lm_head.weight is merged.model.transformer.wte.weight
    assert torch.equal(merged.state["lm_head.weight"], merged.state["transformer.wte.weight"])
    assert merged.report["layers"]["tied"] == {"transformer.wte.weight": ["lm_head.weight"]}


def test_nan_weights_name_the_tensor_and_the_expert(base):
    experts = make_experts(base)
    with torch.no_grad():
        experts["b"][2].weight[0, 0] = float("nan")
    for method in ("linear", "ties"):
        with pytest.raises(CheckpointError, match="expert 'b'.*2.weight"):
            merge(method, base=base, experts=experts)


@pytest.mark.parametrize(
    ("method", "hyperparameters", "message"),
    [
        ("task_arithmetics", {}, "did you mean 'task_arithmetic'"),
        ("ties", {"densty": 0.2}, "no hyperparameter 'densty' .did you mean 'density'"),
        ("ties", {"density": 0}, "density: expected a number in"),
        ("linear", {"weights": [1, 2]}, "weights: expected 3 finite numbers"),
        ("linear", {"weights": [1, -1, 0]}, "sum other than 0"),
        ("linear", {"buffers": "keep"}, "buffers: expected"),
        ("regmean", {"evidence": None}, "missing"),
    ],
)
def test_bad_settings(base, method, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        merge(method, base=base, experts=make_experts(base), **hyperparameters)


def test_methods_that_run_the_model_need_the_module(base):
    states = {name: e.state_dict() for name, e in make_experts(base).items()}
    with pytest.raises(MethodError, match="needs a module"):
        merge("lot", base=base.state_dict(), experts=states, calibration={k: [torch.randn(9, 6)] for k in states})


def test_third_parties_register_methods(base, monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @register_method("first_expert")
    def first_expert(problem, *, scale: float = 1.0):
        return problem.map_layers(lambda layer, base, task_vectors: base + scale * task_vectors[0])

    assert "first_expert" in list_methods() and get_method("first_expert").hyperparameters == {"scale": 1.0}
    experts = make_experts(base)
    merged = merge("first_expert", base=base, experts=experts)
    assert relative_error(flat(merged.state), flat(experts["a"].state_dict())) < 1e-6
    with pytest.raises(MethodError, match="already registered"):
        register_method("first_expert")(lambda problem: None)
    with pytest.raises(MethodError, match="needs: expected some of"):
        register_method("other", needs=("labels",))(lambda problem: None)
    with pytest.raises(MethodError, match="its hyperparameter 'seed' is an argument of merge"):
        register_method("other")(lambda problem, *, seed=0: None)
    arguments = inspect.signature(merge).parameters.values()
    assert {a.name for a in arguments if a.kind != a.VAR_KEYWORD} == registry.RESERVED
