"""Methods in execution order that merge some of a model's layers, around what other methods have made of the others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from statsmerge_ext import LayerRule, merge
from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.methods import Method, by_rules
from tests.closed_forms import make_experts, relative_error
from tests.execution_order import (
    LAYERS,
    OPTIONS,
    SKIPS,
    Encoder,
    ResidualBlock,
    compensate,
    inputs,
    randomise_statistics,
    reference,
)

IN_ORDER = ("drift_compensation", "regmean_plus_plus", "featcal")


def check(base, data, rules, order, norms={}, skips={}):
    """Against the naive implementation; what the rules' methods make of their layers is what they make of them in a
    merge of all layers."""
    base.eval()
    experts = make_experts(base)
    calibration = {name: [x[:3], x[3:]] for name, x in data.items()}
    result = compensate(base, experts, data, layers=rules)
    others = {}
    for rule, facts in zip(rules, result.report["rules"], strict=True):
        alone = merge(rule.method, base=base, experts=experts, calibration=calibration, **rule.hyperparameters).state
        others |= {name: alone[name] for name in facts["layers"]}
    for name, tensor in others.items():
        assert torch.equal(result.state[name], tensor), name
    naive = copy.deepcopy(base), copy.deepcopy(experts)
    expected = reference(*naive, data, order, norms, skips, others=others, **OPTIONS)
    alone = compensate(base, experts, data).model
    for x in data.values():
        exact = expected(x.double())
        assert relative_error(result.model(x), exact) <= 1e-4
        assert relative_error(alone(x), exact) > 0.005  # the comparison can fail
    return result


PAIRS = {"expand": "norm0", "depthwise": "norm1", "project": "norm2"}


def residual_network(bias):
    torch.manual_seed(0)
    return randomise_statistics(nn.Sequential(ResidualBlock(bias), ResidualBlock(bias)))


def test_a_norm_of_another_method_is_applied_as_it_is():
    """It is no part of the convolution before it, which then has nothing to do with the residual connection."""
    rules = LayerRule("0.norm1", "keep"), LayerRule("1.norm2", "linear"), LayerRule("1.expand", "keep")
    norms = {f"{i}.{conv}": f"{i}.{norm}" for i in (0, 1) for conv, norm in PAIRS.items()}
    for of_others in ("0.depthwise", "1.project", "1.expand"):
        del norms[of_others]
    order = ["0.expand", "0.depthwise", "0.project", "1.norm0", "1.depthwise", "1.project"]
    check(residual_network(False), inputs(6, 4, 5, 5), rules, order, norms, {"0.project": "0.expand"})


def test_a_residual_connection_that_a_layer_of_another_method_reads():
    rules = [LayerRule("1.expand", "linear")]
    norms = {f"{i}.{conv}": f"{i}.{norm}" for i in (0, 1) for conv, norm in PAIRS.items() if (i, conv) != (1, "expand")}
    order = ["0.expand", "0.depthwise", "0.project", "1.norm0", "1.depthwise", "1.project"]
    skips = {f"{i}.project": f"{i}.expand" for i in (0, 1)}
    check(residual_network(False), inputs(6, 4, 5, 5), rules, order, norms, skips)


def test_weights_and_biases_that_go_different_ways():
    """A bias of another method is there when its weight is solved, with the BatchNorm's shift, or alone; one whose
    weight is another method's stays the mean; a norm without its shift is no part of the layer before it."""
    rules = (
        LayerRule("0.expand.bias", "keep"),
        LayerRule("0.depthwise.weight", "linear"),
        LayerRule("1.norm0.bias", "keep"),
        LayerRule("1.norm1.weight", "keep"),
        LayerRule("1.project.bias", "keep"),
        LayerRule("1.norm2", "keep"),
    )
    norms = {"0.expand": "0.norm0", "0.project": "0.norm2"}
    order = ["0.expand", "0.norm1", "0.project", "1.expand", "1.norm0", "1.depthwise", "1.project"]
    base = residual_network(True)
    result = check(base, inputs(6, 4, 5, 5), rules, order, norms, {"0.project": "0.expand"})
    for name in ("0.depthwise.bias", "1.norm1.bias"):
        mean = torch.stack([expert.get_parameter(name).detach() for expert in make_experts(base).values()]).mean(0)
        torch.testing.assert_close(result.state[name], mean)


def test_transformer_around_layers_of_four_methods():
    """Also one that looks at the experts' samples, and one whose shares are of all its layers."""
    torch.manual_seed(0)
    base = nn.Sequential(Encoder(), Encoder())
    rules = (
        LayerRule("0.norm1", "keep"),
        LayerRule("1.attention.v", "lot", {"ridge": 1e-3}),
        LayerRule("1.norm2", "linear"),
        LayerRule("0.attention.k", "tsv_m"),
    )
    order = [f"{i}.{name}" for i in (0, 1) for name in LAYERS]
    for of_others in ("0.norm1", "1.attention.v", "1.norm2", "0.attention.k"):
        order.remove(of_others)
    skips = {f"{i}.{name}": f"{i}.{start}" for i in (0, 1) for name, start in SKIPS.items()}
    result = check(base, inputs(6, 5, 8), rules, order, skips=skips)
    assert result.report["never_called"] == [] and result.report["solutions"].keys() == {"1.attention.v.weight"}


def two_layers():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).eval()
    experts = make_experts(base)
    data = inputs(40, 6)
    double = {name: copy.deepcopy(expert).double() for name, expert in experts.items()}
    with torch.no_grad():
        rows = {name: base.double()[1](base[0](x.double())) for name, x in data.items()}
    return base.float(), experts, data, double, rows


def test_regmean_plus_plus_around_a_layer_that_is_kept():
    base, experts, data, double, rows = two_layers()
    calibration = {name: [x] for name, x in data.items()}
    state = merge(
        "keep",
        base=base,
        experts=experts,
        calibration=calibration,
        layers=[LayerRule("2.", "regmean_plus_plus", {"reduce_non_diagonal_ratio": 0.7})],
    ).state
    grams = {name: 0.7 * x.T @ x + 0.3 * (x.T @ x).diag().diag() for name, x in rows.items()}
    product = sum(double[name][2].weight.detach() @ gram for name, gram in grams.items())
    assert relative_error(state["2.weight"], product @ torch.linalg.inv(sum(grams.values()))) <= 1e-5
    assert relative_error(state["2.bias"], sum(e[2].bias for e in double.values()) / 3) <= 1e-6
    assert torch.equal(state["0.weight"], base[0].weight) and torch.equal(state["0.bias"], base[0].bias)


@pytest.mark.parametrize("bias_is_kept", [False, True])
def test_featcal_around_a_layer_that_is_kept(bias_is_kept):
    base, experts, data, double, rows = two_layers()
    rules = [LayerRule("0.", "keep"), *([LayerRule("2.bias", "keep")] if bias_is_kept else [])]
    settings = {"ridge": 0.05, "feature_mix": 0.25, "anchor_scale": 0.66}
    calibration = {name: [x] for name, x in data.items()}
    state = merge("featcal", base=base, experts=experts, calibration=calibration, layers=rules, **settings).state
    start = base[2].weight.detach().double()
    anchor = start + 0.66 * sum(e[2].weight.detach() - start for e in double.values())
    gram, product, bias, count = 0.05 * torch.eye(7).double(), 0.05 * anchor, 0, 0.05
    with torch.no_grad():
        for name, expert in double.items():
            x, own = rows[name], expert[1](expert[0](data[name].double()))
            size = 1 / (x.T @ x).norm()
            mixed = (0.25 * own + 0.75 * x) @ expert[2].weight.T
            gram, product = gram + size * x.T @ x, product + size * mixed.T @ x
        weight = product @ torch.linalg.inv(gram)
        for name, expert in double.items():
            x, own = rows[name], expert[1](expert[0](data[name].double()))
            size = 1 / (x.T @ x).norm()
            bias = bias + size * (expert[2](0.25 * own + 0.75 * x) - x @ weight.T).sum(0)
            count = count + size * len(x)
        held = base[2].bias.double() + 0.66 * sum(e[2].bias - base[2].bias.double() for e in double.values())
        bias = (bias + 0.05 * held) / count
    assert relative_error(state["2.weight"], weight) <= 1e-5
    if bias_is_kept:
        assert torch.equal(state["2.bias"], base[2].bias)
    else:
        assert relative_error(state["2.bias"], bias) <= 1e-5


# Where something has changed


def three_layers(*changed):
    """A base, and experts that differ from it in the layers ``changed``."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    experts = make_experts(base)
    for expert in experts.values():
        for place in {0, 2, 4}.difference(changed):
            expert[place].load_state_dict(base[place].state_dict())
    return base, experts


def unchanged(base, state):
    return [
        place
        for place in (0, 2, 4)
        if all(torch.equal(state[f"{place}.{n}"], t) for n, t in base[place].named_parameters())
    ]


def test_layers_make_up_for_one_that_is_kept_where_experts_changed_it():
    base, experts = three_layers(0)
    assert unchanged(base, compensate(base, experts, inputs(30, 4), layers=[LayerRule("0.", "keep")]).state) == [0]
    base, experts = three_layers(2)
    assert unchanged(base, compensate(base, experts, inputs(30, 4), layers=[LayerRule("2.", "keep")]).state) == [0, 2]
    for expert in experts.values():
        expert[2].weight.data.copy_(base[2].weight)  # its bias alone is changed
    assert unchanged(base, compensate(base, experts, inputs(30, 4), layers=[LayerRule("2.", "keep")]).state) == [0, 2]


@pytest.mark.parametrize("method", IN_ORDER)
def test_nothing_changes_where_nothing_is_changed(method):
    base, experts = three_layers(4)
    calibration = {name: [x] for name, x in inputs(30, 4).items()}
    rules = LayerRule("0.", "linear"), LayerRule("4.", "keep")
    state = merge(method, base=base, experts=experts, calibration=calibration, layers=rules).state
    for name, tensor in base.state_dict().items():
        assert state[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_a_layer_that_another_method_moves_is_made_up_for():
    """Though no expert has changed any."""
    base, experts = three_layers()
    moving = Method.of("moving", lambda problem: problem.map_layers(lambda layer, start, t: 1.5 * start))
    state = compensate(base, experts, inputs(30, 4), layers=[LayerRule("2.", moving)]).state
    torch.testing.assert_close(state["2.weight"], 1.5 * base[2].weight.detach())
    assert unchanged(base, state) == [0]


def test_what_is_tied_or_never_called():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9, bias=False)
            self.head.weight = self.embed.weight
            self.spare, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return self.head(self.hidden(self.embed(x)))

    torch.manual_seed(0)
    base, tokens = Model(), {name: torch.randint(0, 9, (6, 3)) for name in "abc"}
    result = compensate(
        base, make_experts(base), tokens, layers=[LayerRule("head", "keep"), LayerRule("spare", "ties")]
    )
    assert result.model.head.weight is result.model.embed.weight
    assert torch.equal(result.state["head.weight"], base.embed.weight)
    assert not torch.equal(result.state["hidden.weight"], base.hidden.weight)
    assert result.report["never_called"] == ["unused.weight"]


# What cannot be


def test_one_method_of_a_merge_runs_the_model():
    expected = "layers: 'featcal' and 'drift_compensation' both run the model, which one method of a merge can"
    with pytest.raises(MethodError, match=expected):
        by_rules("drift_compensation", [LayerRule("head", "featcal")])
    with pytest.raises(MethodError, match="'adamerging' and 'regmean_plus_plus' both run the model"):
        by_rules("regmean_plus_plus", [LayerRule("head", "adamerging")])
    with pytest.raises(MethodError, match="both run the model"):
        by_rules("drift_compensation", [LayerRule("head", hyperparameters={"ridge": 1.0})])


def test_bad_values_in_layers_of_other_methods():
    """The experts' passes go through them, whatever becomes of them."""
    base, experts = three_layers(0, 2, 4)
    with torch.no_grad():
        experts["b"][2].bias[1] = float("nan")
    with pytest.raises(CheckpointError, match="expert 'b': tensor '2.bias' holds 1 NaN"):
        compensate(base, experts, inputs(30, 4), layers=[LayerRule("2.", "keep")])
    with pytest.raises(MethodError, match="filter '3.' is in no parameter's name"):
        compensate(*three_layers(), inputs(30, 4), layers=[LayerRule("3.", "keep")])
