"""The learning loop: early stopping, divergence, resuming; and the learner as an artefact."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import merge, ops
from statsmerge_ext.distillation import feature_loss, pseudo_label_loss, soft_target_loss
from statsmerge_ext.engine import journal as journals
from statsmerge_ext.engine.learning import _Run, _split
from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.evidence import WeightStatistics
from tests.closed_forms import fine_tuned, make_experts


class Tagger(nn.Module):
    """Logits a token, [N, T, 4]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask):
        return self.out(torch.tanh(self.mix(self.embed(input_ids))) * attention_mask.unsqueeze(-1))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def calibration(experts, batches=4):
    return {
        name: [torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * k + b)) for b in range(batches)]
        for k, name in enumerate(experts)
    }


def learn(base, experts, method="stats_merging", **options):
    options = {"epochs": 6, "lr": 1e-2, **options}
    return merge(method, base=base, experts=experts, calibration=calibration(experts), **options)


def values_of(result):
    return result.coefficients["values"]


@pytest.mark.parametrize("method", ["stats_merging", "adamerging"])
@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_an_interrupted_run_taken_up_again_gives_the_same_coefficients(base, method, holdout, tmp_path, monkeypatch):
    experts = make_experts(base)
    whole = learn(base, experts, method, holdout=holdout)
    monkeypatch.setattr(journals, "_SECONDS_BETWEEN_SAVES", 0.0)
    journal, epoch, calls = tmp_path / "run.journal", _Run.train_epoch, []

    def interrupted(self):
        calls.append(self.epoch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(base, experts, method, holdout=holdout, journal=journal)
    assert journal.exists()
    monkeypatch.setattr(_Run, "train_epoch", lambda self: (calls.append(self.epoch), epoch(self)))
    resumed = learn(base, experts, method, holdout=holdout, journal=journal)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert torch.equal(values_of(resumed), values_of(whole))
    assert resumed.report["training"] == whole.report["training"]
    assert not journal.exists()


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"seed": 1}, {"calibration": None}])
def test_the_journal_of_another_run_is_refused(base, change, tmp_path, monkeypatch):
    experts = make_experts(base)
    monkeypatch.setattr(journals, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(journals.Journal, "remove", lambda self: None)
    options = {"epochs": 2, "lr": 1e-2, "journal": tmp_path / "run.journal", "calibration": calibration(experts)}
    merge("stats_merging", base=base, experts=experts, **options)
    if "calibration" in change:
        change = {"calibration": calibration(experts, batches=3)}
    with pytest.raises(CheckpointError, match="is the journal of another run"):
        merge("stats_merging", base=base, experts=experts, **{**options, **change})


def test_a_damaged_journal_is_refused(base, tmp_path):
    (tmp_path / "run.journal").write_bytes(b"no journal")
    with pytest.raises(CheckpointError, match="cannot be read as a journal"):
        learn(base, make_experts(base), journal=tmp_path / "run.journal")


def test_early_stopping_takes_the_best_epoch_on_the_held_out_batches(base):
    experts = make_experts(base)
    result = learn(base, experts, epochs=200, lr=0.3, holdout=0.25, patience=3)
    training = result.report["training"]
    assert training["steps"] < 200 * 3  # three of the four batches are trained on
    assert training["steps"] == (training["best_epoch"] + 3) * 3
    best = learn(base, experts, epochs=training["best_epoch"], lr=0.3, holdout=0.25, patience=3)
    assert torch.equal(values_of(best), values_of(result))
    assert best.report["training"]["held_out_loss"] == training["held_out_loss"]


def test_every_task_keeps_a_batch_to_train_on():
    train, held_out = _split({"a": [0], "b": [0] * 5}, 0.9, seed=0)
    assert train["a"] == [0] and "a" not in held_out
    assert len(train["b"]) == 1 and sorted(train["b"] + held_out["b"]) == list(range(5))


def test_a_diverging_run_stops_with_the_last_good_coefficients(base):
    experts = make_experts(base)
    result = learn(base, experts, lr=1e30)
    start = learn(base, experts, epochs=1, lr=1e-30)
    assert result.report["training"]["diverged_at_step"] == 1
    torch.testing.assert_close(values_of(result), values_of(start))


@pytest.mark.parametrize("method", ["stats_merging", "adamerging"])
@pytest.mark.parametrize("options", [{}, {"granularity": "task"}, {"holdout": 0.5}])
def test_one_expert_with_one_sample_and_one_among_others(base, method, options):
    experts = make_experts(base)
    first = next(iter(experts))
    alone = {first: [torch.randn(1, 8, generator=torch.Generator().manual_seed(0))]}
    options = {"epochs": 2, "lr": 1e-2, **options}
    one = merge(method, base=base, experts={first: experts[first]}, calibration=alone, **options)
    among = merge(method, base=base, experts=experts, calibration=calibration(experts) | alone, **options)
    for result, count in ((one, 1), (among, len(experts))):
        assert values_of(result).shape == (4, count) and values_of(result).isfinite().all()
        assert not torch.equal(values_of(result), torch.full_like(values_of(result), 0.3))


@pytest.mark.parametrize("method", ["stats_merging", "adamerging"])
def test_what_another_merge_leaves_over_is_weighed_from_there(base, method):
    """The result of one merge is the base of the next: θ = θ_1 + Σ λ_k (θ_k − θ_1), and λ = 0 gives θ_1 back."""
    experts = make_experts(base)
    first = merge("linear", base=base, experts=experts)
    clamp = {"clamp_weights": False} if method == "adamerging" else {}
    still = learn(first.model, experts, method, init_values=0.0, epochs=1, lr=1e-30, **clamp)
    for name, tensor in still.state.items():
        torch.testing.assert_close(tensor, first.state[name], rtol=0, atol=1e-3)
    result = learn(first.model, experts, method, init_values=0.0, epochs=20, **clamp)
    training = result.report["training"]
    assert training["last_loss"] < training["first_loss"]
    for row, name in zip(values_of(result), result.coefficients["names"], strict=True):
        start = first.state[name].double()
        left = [expert.state_dict()[name].double() - start for expert in experts.values()]
        expected = start + sum(value * tensor for value, tensor in zip(row, left, strict=True))
        torch.testing.assert_close(result.state[name].double(), expected, rtol=1e-5, atol=1e-6)


class Tied(nn.Module):
    """Logits a token [N, T, 12] by the embedding that read them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, input_ids):
        return self.out(torch.tanh(self.mix(self.embed(input_ids))))


def test_tied_weights_have_one_coefficient_and_both_their_gradients():
    torch.manual_seed(0)
    base = Tied().eval()
    experts = make_experts(base)
    ids = torch.randint(12, (5, 6), generator=torch.Generator().manual_seed(1))
    batches = dict.fromkeys(experts, [{"input_ids": ids}])
    result = merge("adamerging", base=base, experts=experts, calibration=batches, epochs=1, lr=1e-2)
    assert result.coefficients["names"] == ["embed.weight", "mix.weight", "mix.bias"]
    assert torch.equal(result.state["out.weight"], result.state["embed.weight"])
    # Adam's first step has the sign of the gradient, which is that through both uses of the weight.
    plain = torch.full((3, len(experts)), 0.3, dtype=torch.float64, requires_grad=True)
    names = result.coefficients["names"]
    merged = {
        name: base.state_dict()[name].double()
        + sum(
            plain[row, k] * (expert.state_dict()[name] - base.state_dict()[name]).double()
            for k, expert in enumerate(experts.values())
        )
        for row, name in enumerate(names)
    }
    logits = torch.tanh(F.linear(merged["embed.weight"][ids], merged["mix.weight"], merged["mix.bias"]))
    logits = logits @ merged["embed.weight"].T
    (-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()).backward()
    assert torch.equal((values_of(result) - 0.3).sign(), -plain.grad.sign())


def test_a_compiled_forward_gives_the_same_coefficients(base):
    experts = make_experts(base)
    compiled = torch.compile(lambda model, batch: model(batch), backend="aot_eager")
    plain, ours = learn(base, experts), learn(base, experts, forward=compiled)
    torch.testing.assert_close(values_of(ours), values_of(plain), rtol=1e-4, atol=1e-5)


def test_weights_space_starts_at_the_average(base):
    experts = make_experts(base)
    result = learn(base, experts, space="weights", epochs=1, lr=1e-12)
    mean = merge("linear", base=base, experts=experts).state
    for name, tensor in result.state.items():
        torch.testing.assert_close(tensor, mean[name], rtol=0, atol=2e-3)
    softmax = learn(base, experts, space="weights", softmax=True)
    torch.testing.assert_close(values_of(softmax).sum(1), torch.ones(4).double())


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4", "int3", "int2"])
def test_what_is_merged_is_what_is_stored(base, storage):
    experts = make_experts(base)
    result = learn(base, experts, storage=storage)
    assert (values_of(result) - 0.3).abs().max() > 1e-3
    state = base.state_dict()
    for row, name in zip(values_of(result), result.coefficients["names"], strict=True):
        expected = state[name].double()
        for coefficient, expert in zip(row, experts.values(), strict=True):
            moved = expert.state_dict()[name] - state[name]
            if storage == "bfloat16":
                stored = moved.bfloat16()
            else:
                stored = ops.QuantizedTensor.quantize(moved, int(storage[3:])).dequantize()
            expected += coefficient * stored.double()
        torch.testing.assert_close(result.state[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_adamerging_plus_plus_merges_elected_entries_only(base):
    experts = make_experts(base)
    result = learn(base, experts, "adamerging", density=0.5, granularity="task", epochs=1, lr=1e-12)
    state, states = base.state_dict(), [e.state_dict() for e in experts.values()]
    flat = torch.stack([torch.cat([(s[n] - state[n]).flatten() for n in state]) for s in states])
    cuts = flat.abs().kthvalue(flat.shape[1] - round(0.5 * flat.shape[1]) + 1, dim=1).values
    trimmed = flat * (flat.abs() >= cuts.unsqueeze(1))
    elected = trimmed * (trimmed * trimmed.sum(0).sign() > 0)
    expected = torch.cat([state[n].flatten() for n in state]) + 0.3 * elected.sum(0)
    torch.testing.assert_close(torch.cat([result.state[n].flatten() for n in state]), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_a_saved_learner_predicts_for_experts_it_never_saw(base, shared, tmp_path):
    experts = make_experts(base)
    trained = learn(base, experts, shared=shared)
    path = tmp_path / "learner.json"
    path.write_text(trained.learner.to_json())
    again = merge("stats_merging_predict", base=base, experts=experts, learner=path)
    assert torch.equal(values_of(again), values_of(trained))
    assert all(torch.equal(again.state[name], tensor) for name, tensor in trained.state.items())
    fewer = dict([*experts.items()][:2])
    predicted = merge("stats_merging_predict", base=base, experts=fewer, learner=trained.learner)
    assert values_of(predicted).shape == (4, 2) and values_of(predicted).isfinite().all()


def test_learners_of_their_own_fit_more_closely_and_other_models_not_at_all(base):
    experts = make_experts(base)
    shared, own = (learn(base, experts, epochs=30, shared=shared) for shared in (True, False))
    assert own.learner.layers == own.coefficients["names"] and shared.learner.layers is None
    assert own.report["training"]["last_loss"] < shared.report["training"]["last_loss"]
    experts = {"a": fine_tuned(nn.Linear(8, 4), 1), "b": fine_tuned(nn.Linear(8, 4), 2)}
    with pytest.raises(MethodError, match="a perceptron for each of 4 layers, '0.weight' to '2.bias'"):
        merge("stats_merging_predict", base=nn.Linear(8, 4), experts=experts, learner=own.learner)
    assert learn(base, experts=make_experts(base), granularity="task", shared=False).learner.layers is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "statsmerge-learner-1"}', None])
def test_what_is_no_learner_is_refused(base, content, tmp_path):
    path = tmp_path / "learner.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read as a StatsMerging learner"):
        merge("stats_merging_predict", base=base, experts=make_experts(base), learner=path)


def test_a_learner_refuses_statistics_of_another_kind(base):
    learner = learn(base, make_experts(base), epochs=1).learner
    with pytest.raises(MethodError, match="statistics: the learner expects those of 'weights' with r = 3"):
        learner.features(WeightStatistics(["l"], ["a"], [1], "task_vectors", torch.ones(1, 1, 6)))
    with pytest.raises(MethodError, match="statistics"):
        learner.features(WeightStatistics(["l"], ["a"], [1], "weights", torch.ones(1, 1, 5)))


def test_only_the_chosen_statistics_are_seen(base):
    learner = learn(base, make_experts(base), epochs=1, statistics=["mean", "sigma"]).learner
    assert learner.network.hidden_weight.shape[0] == 2 * 4
    values = torch.rand(4, 3, 6).double()
    other = values.clone()
    other[..., 1:3] *= 7
    one, two = (learner.features(WeightStatistics([], [], [], "weights", v)) for v in (values, other))
    assert torch.equal(one, two)
    other[..., 4] *= 7
    assert not torch.equal(one, learner.features(WeightStatistics([], [], [], "weights", other)))


def test_the_learner_file_is_plain_json(base):
    content = json.loads(learn(base, make_experts(base), epochs=1).learner.to_json())
    assert content["format"] == "statsmerge-learner-1" and content["granularity"] == "layer"


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_padding_tokens_do_not_count(loss):
    torch.manual_seed(0)
    base = Tagger().eval()
    experts = make_experts(base)
    ids = torch.randint(12, (5, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) < torch.tensor([[6], [4], [3], [6], [1]])).long()

    def coefficients(input_ids):
        batches = dict.fromkeys(experts, [{"input_ids": input_ids, "attention_mask": mask}])
        result = merge("stats_merging", base=base, experts=experts, calibration=batches, epochs=3, lr=1e-2, loss=loss)
        return values_of(result)

    exact = coefficients(ids)
    assert torch.equal(exact, coefficients(ids * mask + 7 * (1 - mask)))
    assert not torch.equal(exact, coefficients((ids + 1) % 12))


def test_feature_teachers_need_no_head(base):
    experts = make_experts(base)
    result = learn(base, experts, loss="features", epochs=20)
    assert result.report["training"]["last_loss"] < result.report["training"]["first_loss"]


def test_losses_against_their_definitions():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    kept = mask.bool()
    labels = teacher.argmax(-1)
    torch.testing.assert_close(pseudo_label_loss(student, labels, mask), F.cross_entropy(student[kept], labels[kept]))
    p, q = (teacher[kept] / 2).softmax(-1), (student[kept] / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(soft_target_loss(student, teacher, 2.0, mask), expected)
    distance = (student[kept] - teacher[kept]).square().sum() / teacher[kept].square().sum()
    torch.testing.assert_close(feature_loss(student, teacher, mask), distance)
    assert feature_loss(teacher, teacher) == 0
