"""Methods chosen layer by layer: each layer is what its own method makes of it, and the rules say so or are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import LayerRule, merge
from statsmerge_ext.engine import merging
from statsmerge_ext.engine.merging import default_forward, solve
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.evidence import collect_grams
from statsmerge_ext.layers import find_layers, layers_of_state
from statsmerge_ext.methods import Method, by_rules, get_method
from statsmerge_ext.methods.weights import Schedule
from tests.closed_forms import EXPERTS, least_squares, make_experts, relative_error

SAMPLES = {name: torch.randn(30, 6, generator=torch.Generator().manual_seed(k)) for k, name in enumerate(EXPERTS)}


class Net(nn.Module):
    """Two linear layers that read the same input, a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.left(x) + self.right(x).tanh()))


class Tied(nn.Module):
    """An embedding that is the output projection, too."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.hidden(self.embed(x)))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net().eval()


def merged(method, base, *rules, calibration=SAMPLES, **options):
    if calibration is not None:
        options["calibration"] = {name: [x[:11], x[11:]] for name, x in calibration.items()}
    return merge(method, base=base, experts=make_experts(base), layers=rules, **options)


def mean_task_vector(base, parameter):
    return torch.stack(
        [e.get_parameter(parameter) - base.get_parameter(parameter) for e in make_experts(base).values()]
    )


def test_every_group_is_what_its_own_method_makes_of_it(base):
    """Against float64 least squares, the mean, and the base itself."""
    rules = LayerRule("left", "keep"), LayerRule("norm", "linear"), LayerRule("head", hyperparameters={"ridge": 0.0})
    result = merged("lot", base, *rules, scaling_factor=0.7, ridge=1e-7)
    experts = make_experts(base).values()
    inputs = {"right.weight": list(SAMPLES.values())}
    inputs["head.weight"] = [e.norm(e.left(x) + e.right(x).tanh()).detach() for e, x in zip(experts, SAMPLES.values())]
    for name, features in inputs.items():
        moved = [(e.get_parameter(name) - base.get_parameter(name)).detach() for e in experts]
        expected = base.get_parameter(name).double() + 0.7 * least_squares(features, moved)
        assert relative_error(result.state[name], expected) <= 1e-5
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(result.state[name], base.get_parameter(name) + mean_task_vector(base, name).mean(0))
    assert torch.equal(result.state["left.weight"], base.left.weight)
    assert torch.equal(result.state["left.bias"], base.left.bias)


def test_the_report_says_which_layers_went_by_which_method(base):
    rules = LayerRule("norm", "linear"), LayerRule("head", hyperparameters={"scaling_factor": 0.5})
    report = merged("lot", base, *rules, ridge=1e-3).report
    assert (report["method"], report["hyperparameters"]["ridge"]) == ("lot", 1e-3)
    linear, lot = report["rules"]
    assert linear == {
        "filter": "norm",
        "method": "linear",
        "hyperparameters": {"weights": None, "normalize": True},
        "layers": ["norm.weight", "norm.bias"],
    }
    assert lot["hyperparameters"] == {"scaling_factor": 0.5, "ridge": 1e-3, "rcond": None}
    assert lot["layers"] == ["head.weight", "head.bias"]
    assert report["solutions"].keys() == {"left.weight", "right.weight", "head.weight"}
    assert report["layers"]["never_called"] == []


def test_layers_that_share_a_gram_matrix_may_go_different_ways(base, monkeypatch):
    """Each way is given what it needs of the evidence, and nothing is collected of the others or kept behind."""
    watched = []
    collect = merging.collect_shared_grams
    monkeypatch.setattr(
        merging,
        "collect_shared_grams",
        lambda model, layers, *a, **o: watched.extend(layers) or collect(model, layers, *a, **o),
    )
    rules = LayerRule("right", "regmean"), LayerRule("norm", "keep"), LayerRule("head", "task_arithmetic")
    result = merged("lot", base, *rules)
    assert [layer.name for layer in watched] == ["left.weight", "left.bias", "right.weight", "right.bias"]
    lot, regmean = merged("lot", base).state, merged("regmean", base).state
    for name in ("weight", "bias"):
        assert torch.equal(result.state[f"left.{name}"], lot[f"left.{name}"])
        assert torch.equal(result.state[f"right.{name}"], regmean[f"right.{name}"])
    calibration = {name: [x] for name, x in SAMPLES.items()}
    solved = solve(by_rules("lot", rules), base=base, experts=make_experts(base), calibration=calibration)
    assert solved.problem.evidence.grams == {} and solved.problem.evidence.products == {}


def test_evidence_that_was_collected_before_is_left_as_it_is(base):
    experts = {name: expert.state_dict() for name, expert in make_experts(base).items()}
    calibration = {name: [x] for name, x in SAMPLES.items()}
    layers = find_layers(base)
    evidence = collect_grams(base, layers, base.state_dict(), experts, calibration, forward=default_forward)
    options = {"base": base, "experts": experts, "layers": [LayerRule("right", "regmean"), LayerRule("norm", "keep")]}
    expected = merge("lot", calibration=calibration, **options).state
    for _ in range(2):
        state = merge("lot", evidence=evidence, **options).state
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_tied_parameter_is_found_by_any_of_its_names():
    torch.manual_seed(0)
    base = Tied()
    for name in ("embed", "head"):
        result = merged("linear", base, LayerRule(name, "keep"), calibration=None)
        assert torch.equal(result.state["embed.weight"], base.embed.weight)
        assert result.state["head.weight"] is result.state["embed.weight"]
        assert result.report["rules"][0]["layers"] == ["embed.weight"]
        assert not torch.equal(result.state["hidden.weight"], base.hidden.weight)


def test_ties_counts_the_entries_of_its_own_layers(base):
    result = merged("keep", base, LayerRule("weight", "ties", {"density": 0.3}), calibration=None)
    names = [name for name, _ in base.named_parameters() if "weight" in name]
    start = torch.cat([base.get_parameter(name).double().flatten() for name in names])
    moved = [
        torch.cat([e.get_parameter(name).double().flatten() for name in names]) - start
        for e in make_experts(base).values()
    ]
    trimmed = []
    for task_vector in moved:
        kept = task_vector.abs().topk(round(0.3 * len(task_vector))).indices
        trimmed.append(torch.zeros_like(task_vector).index_copy(0, kept, task_vector[kept]))
    sign = sum(trimmed).sign()
    agreeing = [t * (t * sign > 0) for t in trimmed]
    expected = start + sum(agreeing) / sum((t != 0).double() for t in agreeing).clamp_min(1)
    ours = torch.cat([result.state[name].flatten() for name in names])
    torch.testing.assert_close(ours.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(result.state[name], base.get_parameter(name)) for name in result.state if name not in names)


def test_gradients_run_through_the_whole_model_whatever_layers_are_left():
    state = {f"blocks.{i}.weight": torch.zeros(2) for i in range(5)}
    experts = {name: {key: torch.ones(2) for key in state} for name in "ab"}
    rules = [LayerRule("blocks.4.", "keep"), LayerRule("blocks.2.", hyperparameters={"scaling_factor": 10.0})]
    weights = [Schedule((0, 1)), 0.0]
    result = merge("task_arithmetic", base=state, experts=experts, layers=rules, weights=weights, scaling_factor=1.0)
    assert [float(tensor[0]) for tensor in result.state.values()] == [0, 0.25, 5.0, 0.75, 0]
    assert result.coefficients["values"].tolist() == [[0, 0], [0.25, 0], [5.0, 0], [0.75, 0], [0, 0]]
    anchored = merge("layer_wise_anchor", base=state, experts=experts, layers=rules[:1]).coefficients["values"]
    assert torch.equal(anchored[:4], merge("layer_wise_anchor", base=state, experts=experts).coefficients["values"][:4])


def test_coefficients_are_those_of_the_layers_that_have_some(base):
    solved = solve(by_rules("task_arithmetic", [LayerRule("head", "keep")]), base=base, experts=make_experts(base))
    assert solved.solution.is_weighted_sum and solved.solution.coefficients[-1].tolist() == [0, 0, 0]
    rules = LayerRule("head", "dare_linear"), LayerRule("norm", "ties")
    table = merged("keep", base, *rules, calibration=None).coefficients
    rows = dict(zip(table["names"], table["values"], strict=True))
    assert torch.allclose(rows["head.weight"], torch.full((3,), 1 / 3).double())
    assert rows["norm.weight"].isnan().all() and rows["left.weight"].tolist() == [0, 0, 0]
    # What goes block by block from disk to disk has no coefficients, nor has it in memory.
    assert merged("lot", base, LayerRule("head", "linear")).coefficients is None


def test_nothing_is_read_of_the_experts_where_the_base_is_kept(base):
    experts = {name: expert.state_dict() for name, expert in make_experts(base).items()}
    experts["a"]["head.bias"][0] = float("nan")
    state = merge("linear", base=base, experts=experts, layers=[LayerRule("head", "keep")]).state
    assert torch.equal(state["head.bias"], base.head.bias)
    with pytest.raises(CheckpointError, match="'head.bias' holds 1 NaN"):
        merge("linear", base=base, experts=experts, layers=[LayerRule("norm", "keep")])


def test_coefficients_are_learned_around_layers_that_are_merged_before(base):
    """AdaMerging by plain float64 autograd, with LOT's solution, and the base, in the layers that are not its own."""
    rules = LayerRule("left", "lot"), LayerRule("norm", "keep")
    training = {"epochs": 4, "lr": 0.05}
    calibration = {name: [x] for name, x in SAMPLES.items()}
    experts = make_experts(base)
    result = merge("adamerging", base=base, experts=experts, layers=rules, calibration=calibration, **training)
    start = base.double().state_dict()
    lot = merge("lot", base=base.float(), experts=experts, calibration=calibration).state
    start.update({name: lot[name].double() for name in ("left.weight", "left.bias")})
    free = [name for name in start if name.startswith(("right", "head"))]
    moved = {name: [e.state_dict()[name].double() - start[name] for e in experts.values()] for name in free}
    values = torch.full((len(free), 3), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=training["lr"])

    def weights():
        mixed = {name: sum(c * t for c, t in zip(row, moved[name])) for name, row in zip(free, values.clamp(0, 1))}
        return {name: tensor + mixed.get(name, 0) for name, tensor in start.items()}

    for _ in range(training["epochs"]):
        optimizer.zero_grad()
        for x in SAMPLES.values():
            logits = torch.func.functional_call(base.double(), weights(), (x.double(),))
            (-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean() / 3).backward(retain_graph=True)
        optimizer.step()
    table = dict(zip(result.coefficients["names"], result.coefficients["values"], strict=True))
    torch.testing.assert_close(torch.stack([table[name] for name in free]), values.detach(), rtol=1e-4, atol=1e-4)
    assert table["left.weight"].isnan().all() and table["norm.weight"].tolist() == [0, 0, 0]
    for name, tensor in weights().items():
        torch.testing.assert_close(result.state[name].double(), tensor.detach(), rtol=1e-5, atol=1e-5)
    assert result.report["training"]["steps"] == 4 and result.report["solutions"].keys() == {"left.weight"}


def test_what_is_fixed_is_fixed_under_all_names_of_a_tied_parameter():
    torch.manual_seed(0)
    base, tokens = Tied(), {name: [torch.randint(0, 9, (6, 3))] for name in EXPERTS}
    starts = []

    def learns(problem):
        starts.append((dict(problem.base), [layer.name for layer in problem.layers]))
        return problem.map_layers(lambda layer, start, task_vectors: start + task_vectors[0])

    method = Method.of("learns", learns, ("batches",))
    rules = [LayerRule("head", "linear")]
    state = merge(method, base=base, experts=make_experts(base), layers=rules, calibration=tokens).state
    ((start, names),) = starts
    mean = (base.embed.weight + mean_task_vector(base, "embed.weight").mean(0)).detach()
    for name in ("embed.weight", "head.weight"):
        torch.testing.assert_close(start[name], mean)
        assert torch.equal(state[name], start[name])
    assert names == ["hidden.weight", "hidden.bias"] and torch.equal(start["hidden.weight"], base.hidden.weight)
    torch.testing.assert_close(state["hidden.weight"], make_experts(base)["a"].hidden.weight.detach())


def test_what_was_learned_of_some_layers_is_in_the_result(base):
    result = merged("stats_merging", base, LayerRule("left", "ties"), epochs=2)
    assert result.learner.to_json()
    rows = dict(zip(result.coefficients["names"], result.coefficients["values"], strict=True))
    assert rows["left.weight"].isnan().all() and (rows["right.weight"] - 0.3).abs().max() > 1e-4


def test_esm_merges_its_own_layers(base):
    merged_alone, beside = merged("esm", base), merged("esm", base, LayerRule("head", "keep"))
    for name in ("left.weight", "right.weight", "norm.bias"):
        assert torch.equal(beside.state[name], merged_alone.state[name]), name
    assert torch.equal(beside.state["head.weight"], base.head.weight)


def refusal(method, *rules, layers=None):
    with pytest.raises(MethodError) as caught:
        by_rules(method, rules).check_layers(layers or find_layers(Net()))
    return str(caught.value)


def test_rules_without_effect_are_refused():
    assert refusal("linear", LayerRule("haed", "keep")) == (
        "layers[0]: filter 'haed' is in no parameter's name (did you mean 'head'?)"
    )
    names = layers_of_state({f"model.layers.{i}.mlp.weight": torch.zeros(2, 2) for i in range(3)})
    assert "(did you mean 'layers.2'?)" in refusal("linear", LayerRule("layer.2", "keep"), layers=names)
    assert refusal("linear", LayerRule("head", "keep"), LayerRule("head.bias", "ties")) == (
        "layers[1]: filter 'head.bias' fits only layers that rules before it fit, too"
    )
    assert "none is left for method 'linear'" in refusal("linear", LayerRule("head", "keep"), LayerRule("*", "ties"))


def test_unknown_methods_and_hyperparameters_are_refused():
    assert refusal("lot", LayerRule("head", "kepe")).startswith(
        "layers[0] ('head'): unknown method 'kepe' (did you mean 'keep'?)"
    )
    assert refusal("lot", LayerRule("head", hyperparameters={"rigde": 1})).startswith(
        "layers[0] ('head'): method 'lot' has no hyperparameter 'rigde' (did you mean 'ridge'?)"
    )


def test_only_one_method_can_run_the_model():
    assert "'adamerging' and 'stats_merging' both run the model" in refusal(
        "stats_merging", LayerRule("head", "adamerging")
    )
    assert "both run the model" in refusal("stats_merging", LayerRule("head", hyperparameters={"epochs": 3}))


def test_what_decides_the_result_is_part_of_its_identity():
    rules = [LayerRule("head", "keep"), LayerRule("norm", "ties", {"density": 0.5})]
    facts = [by_rules("linear", rules[:n]).identity({}) for n in range(3)]
    facts.append(by_rules("linear", [rules[0], LayerRule("norm", "ties", {"density": 0.4})]).identity({}))
    assert len({str(fact) for fact in facts}) == 4
    assert by_rules("linear", []) is get_method("linear")


def test_parts_of_a_packed_parameter_stay_together():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    base = nn.Sequential()
    base.add_module("attention", attention)
    problem = MergeProblem(
        find_layers(base), base.state_dict(), {n: e.state_dict() for n, e in make_experts(base).items()}
    )
    method = by_rules("keep", [LayerRule("in_proj_weight", "tsv_m")])
    alone = get_method("tsv_m")(problem).parameters["attention.in_proj_weight"]
    assert torch.equal(method(problem).parameters["attention.in_proj_weight"], alone)
    assert F.mse_loss(alone, attention.in_proj_weight) > 0


def test_what_methods_note_of_layers_is_joined(base):
    def of_layers(problem):
        return problem.map_layers(
            lambda layer, start, t: start, notes={"seen": {x.name: 1 for x in problem.layers}, "n": 1}
        )

    method = Method.of("of_layers", of_layers)
    report = merged(method, base, LayerRule("head", method), LayerRule("norm", "keep"), calibration=None).report
    others = [f"{side}.{name}" for side in ("left", "right") for name in ("weight", "bias")]
    assert report["seen"] == dict.fromkeys(["head.weight", "head.bias", *others], 1) and report["n"] == [1, 1]
