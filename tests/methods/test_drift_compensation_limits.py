"""Drift compensation at its limits: what is kept, shared, padded, refused; and by recipe."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from statsmerge_ext import merge
from tests.closed_forms import fine_tuned, make_experts, relative_error
from tests.execution_order import OPTIONS, ResidualBlock, compensate, inputs, randomise_statistics
from tests.tiny_models import merge as merge_recipe
from tests.tiny_models import save_tiny_family, states


def test_layers_that_are_never_called_are_the_mean_and_reported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.used, self.unused = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x + self.token)

    base = Model()
    experts = make_experts(base)
    result = compensate(base, experts, inputs(20, 4))
    assert result.report["never_called"] == ["unused.weight"]
    for name in ("token", "unused.weight", "unused.bias"):
        mean = torch.stack([e.get_parameter(name).detach() for e in experts.values()]).mean(0)
        torch.testing.assert_close(result.model.get_parameter(name).detach(), mean)


def test_scale_of_the_one_plus_weight_form():
    """The norm is solved for 1 + weight: with the plain form's weights in its place, nothing changes."""

    class PlainNorm(GemmaRMSNorm):
        def forward(self, x):
            return self._norm(x.float()) * self.weight

    def model(kind, state=None):
        network = nn.Sequential(nn.Linear(5, 6), kind(6), nn.Linear(6, 3)).eval()
        if state is not None:
            change = 1 if kind is PlainNorm else -1
            network.load_state_dict({k: v + change * (k == "1.weight") for k, v in state.items()})
        return network

    torch.manual_seed(0)
    base, data = model(GemmaRMSNorm), inputs(30, 5)
    experts = make_experts(base)
    merged = compensate(base, experts, data).model
    plain = {name: model(PlainNorm, e.state_dict()) for name, e in experts.items()}
    expected = compensate(model(PlainNorm, base.state_dict()), plain, data).model
    for x in data.values():
        assert relative_error(merged(x), expected(x)) <= 1e-5


def test_a_linear_map_of_the_drift_is_undone():
    """One expert: after the first layer the merged model lags behind; the last layers make up for it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    expert, x = fine_tuned(base, 1), torch.randn(500, 6)
    merged = merge(
        "drift_compensation",
        base=base,
        experts={"a": expert},
        calibration={"a": [x]},
        scaling_factor=1.0,
        ridge=1e-9,
        drift_ridge=1e-9,
    ).model
    assert relative_error(merged(x), expert(x)) <= 1e-4


def test_zero_task_vectors_give_the_base_bit_for_bit():
    base = randomise_statistics(nn.Sequential(ResidualBlock(), nn.Flatten(), nn.Linear(100, 3))).eval()
    with torch.no_grad():
        base[0].project.weight.view(-1)[0] = -0.0
    merged = compensate(base, {name: base for name in "abc"}, inputs(6, 4, 5, 5))
    for key, value in base.state_dict().items():
        assert merged.state[key].numpy().tobytes() == value.numpy().tobytes(), key


def test_task_arithmetic_where_there_are_no_inputs():
    base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    experts = make_experts(base)
    data = {name: torch.cat([x, torch.zeros(50, 3)], 1) for name, x in inputs(50, 3).items()}
    merged, kept = (compensate(base, experts, data, anchor=anchor).model for anchor in ("sum", "base"))
    total = sum(e[0].weight - base[0].weight for e in experts.values())
    expected = base[0].weight + OPTIONS["scaling_factor"] * 3 * total
    torch.testing.assert_close(merged[0].weight[:, 3:], expected[:, 3:])
    assert torch.equal(kept[0].weight[:, 3:], base[0].weight[:, 3:])
    assert not torch.equal(kept[0].weight[:, :3], base[0].weight[:, :3])


def test_layers_before_the_first_change_are_the_bases_own():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    experts = make_experts(base)
    for expert in experts.values():
        expert[0].load_state_dict(base[0].state_dict())
        expert[4].load_state_dict(base[4].state_dict())
    merged = compensate(base, experts, inputs(30, 4)).model
    assert torch.equal(merged[0].weight, base[0].weight) and torch.equal(merged[0].bias, base[0].bias)
    assert not torch.equal(merged[4].weight, base[4].weight)  # it makes up for the layer before it


def test_dropout_is_off_and_modes_are_left_alone():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    experts, data = make_experts(base), inputs(30, 4)
    training = compensate(base.train(), experts, data)
    for key, value in compensate(copy.deepcopy(base).eval(), experts, data).state.items():
        assert torch.equal(training.state[key], value)
    assert training.model.training


def tiny_bert(vocabulary=30):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=10,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def test_padding_changes_nothing():
    base = tiny_bert()
    experts = make_experts(base)
    ids = {name: torch.randint(1, 30, (8, 6), generator=torch.Generator().manual_seed(1)) for name in experts}
    mask = (torch.arange(6) < torch.tensor([6, 4, 3, 6, 2, 5, 6, 1]).unsqueeze(1)).long()

    def merged(padding):
        batches = {
            name: [{"input_ids": torch.where(mask == 1, rows, padding), "attention_mask": mask}]
            for name, rows in ids.items()
        }
        return merge("drift_compensation", base=base, experts=experts, calibration=batches).state

    one, other = merged(0), merged(7)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)


def test_embeddings_are_means_by_counts():
    base = tiny_bert()
    experts = make_experts(base)
    ids = {
        name: torch.randint(0, 20, (5, 6), generator=torch.Generator().manual_seed(k)) for k, name in enumerate("abc")
    }
    batches = {name: [{"input_ids": rows}] for name, rows in ids.items()}
    merged = merge("drift_compensation", base=base, experts=experts, calibration=batches).state
    key = "embeddings.word_embeddings.weight"
    moved = torch.stack([e.state_dict()[key] for e in experts.values()]).double()
    counts = torch.stack([torch.bincount(rows.flatten(), minlength=30) for rows in ids.values()]).double()
    expected = torch.einsum("kv,kve->ve", counts, moved) / counts.sum(0).unsqueeze(-1)
    expected = torch.where(counts.sum(0).unsqueeze(-1) > 0, expected, moved.mean(0))
    assert relative_error(merged[key], expected) <= 1e-6


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=9)).eval()
    experts = make_experts(base)
    batches = {name: [{"input_ids": torch.randint(0, 20, (4, 8))}] for name in experts}
    merged = merge("drift_compensation", base=base, experts=experts, calibration=batches)
    assert torch.equal(merged.state["lm_head.weight"], merged.state["transformer.wte.weight"])
    assert merged.model.lm_head.weight is merged.model.transformer.wte.weight


def test_runs_are_repeatable_and_batches_do_not_matter():
    torch.manual_seed(0)
    base = randomise_statistics(nn.Sequential(ResidualBlock(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(54, 3)))
    base.eval()
    experts, data = make_experts(base), inputs(80, 4, 5, 5)
    first = compensate(base, experts, data)  # joined up to 64 samples: 3, and 77
    again = compensate(base, experts, data)
    several = merge(
        "drift_compensation",
        base=base,
        experts=experts,
        calibration={name: x.split(9) for name, x in data.items()},
        **OPTIONS,
    )
    for key, value in first.state.items():
        assert torch.equal(value, again.state[key]), key
        torch.testing.assert_close(several.state[key], value, rtol=1e-3, atol=1e-4)


def test_bfloat16_model_is_merged_in_float32():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    experts, data = make_experts(base), inputs(40, 6)
    half = compensate(
        copy.deepcopy(base).bfloat16(),
        {k: copy.deepcopy(e).bfloat16() for k, e in experts.items()},
        {k: v.bfloat16() for k, v in data.items()},
    ).model
    full = compensate(base, experts, data).model
    assert half[0].weight.dtype == torch.bfloat16
    for x in data.values():
        assert relative_error(half(x.bfloat16()), full(x)) <= 0.03


@pytest.mark.parametrize("name", ["ridge", "drift_ridge"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_ridge_that_is_none_is_refused(name, value):
    base = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0"):
        compensate(base, make_experts(base), inputs(9, 3), **{name: value})


def test_by_recipe_and_command_line(tmp_path):
    models = save_tiny_family(tmp_path)
    parameters = {"scaling_factor": 1.1, "ridge": 0.01, "drift_ridge": 0.1}
    calibration = {"data": "texts.txt", "samples": 12}
    assert merge_recipe(models, method="drift_compensation", parameters=parameters, calibration=calibration) == 0
    report = json.loads((models / "out" / "merge_report.json").read_text())
    assert report["method"] == "drift_compensation" and report["never_called"] == []
    out, base = states(models, "out", "base")
    assert any(not torch.equal(out[key], base[key]) for key in base)
