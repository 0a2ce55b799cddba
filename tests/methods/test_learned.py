"""StatsMerging and AdaMerging: gradients, what is read, what is learned."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import merge
from statsmerge_ext.engine.merged_model import LayerWiseMergedModel
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import CalibrationError, MethodError
from statsmerge_ext.layers import find_layers
from statsmerge_ext.methods.learner import Normalisation, StatsMergeLearner
from tests.closed_forms import fine_tuned, make_experts


class Attentive(nn.Module):
    """A packed parameter, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.norm(self.attention(x, x, x, need_weights=False)[0]).mean(1))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Attentive().eval()


def calibration(experts, samples=6):
    return {
        name: [torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(10 * k + b)) for b in range(2)]
        for k, name in enumerate(experts)
    }


def problem_of(base, experts, batches):
    states = {name: expert.state_dict() for name, expert in experts.items()}
    return MergeProblem(
        find_layers(base),
        base.state_dict(),
        states,
        model=copy.deepcopy(base),
        forward=default_forward,
        batches=batches,
    )


def test_coefficient_gradient_equals_autograd_through_the_plain_formula(base):
    base = base.double()
    experts = make_experts(base)
    batches = calibration(experts)
    batches = {k: [b.double() for b in v] for k, v in batches.items()}
    merged = LayerWiseMergedModel(problem_of(base, experts, batches))
    ours = torch.rand(len(merged.layers), 3, dtype=torch.float64, requires_grad=True)
    merged.merge_weights(ours)
    for task in batches.values():
        merged.accumulate(merged(task[0]).square().sum())
    merged.backward()

    plain = ours.detach().clone().requires_grad_()
    weights = {}
    for row, layer in enumerate(merged.layers):
        start = layer.part(base.state_dict()[layer.parameter])
        moved = [layer.part(e.state_dict()[layer.parameter]) - start for e in experts.values()]
        part = start + sum(plain[row, k] * t for k, t in enumerate(moved))
        weights[layer.parameter] = torch.cat([weights[layer.parameter], part]) if layer.parameter in weights else part
    sum(torch.func.functional_call(base, weights, (task[0],)).square().sum() for task in batches.values()).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_stats_merging_comes_closer_to_the_teachers(base, granularity, loss):
    experts = make_experts(base)
    batches = calibration(experts)
    result = merge(
        "stats_merging",
        base=base,
        experts=experts,
        calibration=batches,
        granularity=granularity,
        loss=loss,
        epochs=20,
        lr=1e-2,
    )
    training = result.report["training"]
    assert training["steps"] == 40 and training["last_loss"] < training["first_loss"]
    values = result.coefficients["values"]
    assert values.shape == (len(result.coefficients["names"]), 3) and not torch.allclose(
        values, torch.tensor(0.3).double()
    )
    if granularity == "task":
        assert torch.equal(values, values[:1].expand_as(values))


def test_learner_parameters_receive_gradients():
    torch.manual_seed(0)
    learner = StatsMergeLearner(12)
    statistics = torch.rand(5, 3, 6)
    coefficients = learner(Normalisation.of(statistics)(statistics))
    assert coefficients.shape == (5, 3)
    torch.testing.assert_close(coefficients, torch.full((5, 3), 0.3), atol=0.01, rtol=0)
    coefficients.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in learner.parameters())


def test_training_moves_the_learner_and_nothing_else(base, monkeypatch):
    experts = make_experts(base)
    learners, grads = [], []
    original = StatsMergeLearner.__init__

    def remember(self, *args):
        original(self, *args)
        learners.append(self)
        for parameter in self.parameters():
            parameter.register_hook(lambda g: grads.append(float(g.abs().max())))

    monkeypatch.setattr(StatsMergeLearner, "__init__", remember)
    head = nn.Linear(4, 3)
    before = head.weight.clone(), {k: {n: p.clone() for n, p in e.named_parameters()} for k, e in experts.items()}
    merge(
        "stats_merging",
        base=base,
        experts=experts,
        calibration=calibration(experts),
        heads=dict.fromkeys(experts, head),
        epochs=2,
    )
    assert len(learners) == 1 and grads and min(grads) > 0
    assert torch.equal(head.weight, before[0]) and head.weight.grad is None
    assert all(torch.equal(p, before[1][k][n]) for k, e in experts.items() for n, p in e.named_parameters())


@pytest.mark.parametrize("method", ["stats_merging", "adamerging"])
def test_autocast_runs_model_and_head_in_bfloat16_and_learns_nearly_the_same(base, method):
    experts = make_experts(base)
    head, seen = nn.Linear(4, 3), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))

    def learn(autocast):
        seen.clear()
        options = {"epochs": 10, "lr": 1e-2, "autocast": autocast}
        heads = dict.fromkeys(experts, head)
        result = merge(method, base=base, experts=experts, calibration=calibration(experts), heads=heads, **options)
        return result.coefficients["values"], seen[-1]

    exact, dtype = learn(False)
    assert dtype == torch.float32
    nearly, dtype = learn(True)
    assert dtype == torch.bfloat16
    moved = (exact - 0.3).abs().max()
    assert 0 < (nearly - exact).abs().max() < 0.2 * moved


@pytest.mark.parametrize("method", ["stats_merging", "lot"])
def test_the_merged_model_is_in_the_mode_of_the_base(base, method):
    experts = make_experts(base)
    base.train()
    base.norm.eval()
    base.out.weight.requires_grad_(False)
    options = {"epochs": 1} if method == "stats_merging" else {}
    model = merge(method, base=base, experts=experts, calibration=calibration(experts), **options).model
    assert {n: m.training for n, m in model.named_modules()} == {n: m.training for n, m in base.named_modules()}
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]


def test_labels_are_refused(base):
    experts = make_experts(base)
    for batch in ((torch.randn(3, 5, 8), torch.zeros(3)), {"x": torch.randn(3, 5, 8), "labels": torch.zeros(3)}):
        with pytest.raises(CalibrationError, match="label"):
            merge("stats_merging", base=base, experts=experts, calibration=dict.fromkeys(experts, [batch]))


@pytest.mark.parametrize("method", ["stats_merging", "adamerging"])
def test_a_seed_gives_the_same_result_twice(base, method):
    experts = make_experts(base)
    one, two, other = (
        merge(method, base=base, experts=experts, calibration=calibration(experts), epochs=3, seed=seed).coefficients[
            "values"
        ]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_softmax_coefficients_sum_to_one(base):
    experts = make_experts(base)
    result = merge(
        "stats_merging", base=base, experts=experts, calibration=calibration(experts), epochs=2, softmax=True
    )
    torch.testing.assert_close(
        result.coefficients["values"].sum(1), torch.ones(len(result.coefficients["names"])).double()
    )


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_adamerging_lowers_the_entropy(base, granularity):
    experts = make_experts(base)
    result = merge(
        "adamerging",
        base=base,
        experts=experts,
        calibration=calibration(experts),
        granularity=granularity,
        epochs=20,
        lr=2e-2,
    )
    assert result.report["training"]["last_loss"] < result.report["training"]["first_loss"]
    values = result.coefficients["values"]
    assert values.min() >= 0 and values.max() <= 1


def test_layers_that_no_expert_changed_have_no_coefficients(base):
    experts = make_experts(base)
    for expert in experts.values():
        expert.norm.load_state_dict(base.norm.state_dict())
    result = merge("adamerging", base=base, experts=experts, calibration=calibration(experts), epochs=1)
    rows = dict(zip(result.coefficients["names"], result.coefficients["values"], strict=True))
    assert rows["norm.weight"].isnan().all() and not rows["out.weight"].isnan().any()
    assert torch.equal(result.model.norm.weight, base.norm.weight)


def test_heads_turn_features_into_logits(base):
    experts = make_experts(base)

    def pooled(model, batch):
        return model.norm(model.attention(batch, batch, batch, need_weights=False)[0]).mean(1)

    heads = {name: lambda features, w=torch.randn(3, 8): F.linear(features, w) for name in experts}
    result = merge(
        "stats_merging",
        base=base,
        experts=experts,
        calibration=calibration(experts),
        forward=pooled,
        heads=heads,
        epochs=2,
    )
    rows = dict(zip(result.coefficients["names"], result.coefficients["values"], strict=True))
    assert not rows["norm.weight"].isnan().any()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("stats_merging", {"granularity": "tensor"}, "granularity: expected 'layer' or 'task'"),
        ("stats_merging", {"loss": "mse"}, "loss: expected one of"),
        ("stats_merging", {"of": "gradients"}, "of: expected one of"),
        ("adamerging", {"epochs": 0}, "epochs, lr, lr_step: expected positive numbers"),
        ("stats_merging", {"init_values": 1e30}, "the first loss is"),
        ("stats_merging", {"space": "gradients"}, "space: expected one of"),
        ("stats_merging", {"storage": "int5"}, "storage: expected one of"),
        ("stats_merging", {"statistics": ["median"]}, "statistics: expected some of"),
        ("stats_merging", {"temperature": 0.0}, "temperature: expected a positive number"),
        ("stats_merging", {"holdout": 1.0}, "holdout, patience: expected"),
        ("adamerging", {"density": 2.0}, "density: expected a number in"),
    ],
)
def test_bad_settings(base, method, options, message):
    experts = make_experts(base)
    with pytest.raises(ValueError, match=message):
        merge(method, base=base, experts=experts, calibration=calibration(experts), **options)


def test_experts_equal_to_the_base_have_nothing_to_learn(base):
    with pytest.raises(MethodError, match="equal the base"):
        merge("adamerging", base=base, experts={"a": base}, calibration={"a": [torch.randn(2, 5, 8)]})


def test_outputs_that_are_no_logits_are_refused(base):
    expert = fine_tuned(base, 1)
    with pytest.raises(CalibrationError, match="heads: expected a head for every expert"):
        merge(
            "stats_merging",
            base=base,
            experts={"a": expert},
            calibration=calibration({"a": expert}),
            forward=lambda model, batch: model(batch).sum(),
            epochs=1,
        )
