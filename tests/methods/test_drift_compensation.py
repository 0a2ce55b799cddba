"""Drift compensation against a naive float64 implementation: a forward sweep a layer, least squares on raw rows."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from statsmerge_ext import merge
from tests.closed_forms import fine_tuned, grouped_patches, make_experts, relative_error
from tests.tiny_models import merge as merge_recipe
from tests.tiny_models import save_tiny_family, states

TOLERANCE = 1e-4
OPTIONS = {"scaling_factor": 1.15, "ridge": 2e-3, "drift_ridge": 4e-2}


def compensate(base, experts, data, **options):
    calibration = {name: [x[:3], x[3:]] for name, x in data.items()}
    return merge("drift_compensation", base=base, experts=experts, calibration=calibration, **{**OPTIONS, **options})


def inputs(*shape):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(*shape, generator=generator) for name in ("a", "b", "c")}


# The naive implementation. `order` names the modules in execution order; `norms` says which BatchNorm follows a module,
# `skips` the module whose input is added to a module's output.


def reference(base, experts, data, order, norms={}, skips={}, scaling_factor=1.15, ridge=2e-3, drift_ridge=4e-2):
    base, experts = base.double().eval(), {name: e.double().eval() for name, e in experts.items()}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for key, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([e.state_dict()[key] for e in experts.values()]).mean(0))
        for path in order:
            solve(merged, base, experts, data, path, norms, skips, scaling_factor, ridge, drift_ridge)
    return merged


def solve(merged, base, experts, data, path, norms, skips, scaling_factor, ridge, drift_ridge):
    module, start = merged.get_submodule(path), base.get_submodule(path)
    is_scale = isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
    norm = norms.get(path)
    shifted = module.bias is not None or norm is not None
    rows, linear, targets = [], [], []
    for name, expert in experts.items():
        of_expert, of_merged = seen(expert, data[name].double()), seen(merged, data[name].double())
        for own_x, x in zip(of_expert[path], of_merged[path], strict=True):
            own = expert.get_submodule(path)
            wanted, on_merged = own(own_x), own(x)
            if norm:
                wanted, on_merged = (expert.get_submodule(norm)(y) for y in (wanted, on_merged))
            if path in skips:
                (carried,), (now,) = of_expert[skips[path]], of_merged[skips[path]]
                wanted = wanted + carried - now
            if norm:
                wanted, on_merged = (undone(merged.get_submodule(norm), y) for y in (wanted, on_merged))
            rows.append(features(module, x))
            targets.append(as_rows(module, wanted))
            linear.append(as_rows(module, on_merged))
    groups = getattr(module, "groups", 1)
    weight = start.weight.clone()
    if is_scale:
        parts = [([x[:, [c]] for x in rows], [c]) for c in range(len(weight))]
    else:
        outputs = list(torch.arange(len(weight)).chunk(groups))
        parts = [([x[g] for x in rows], outputs[g]) for g in range(groups)]
    shifts = torch.zeros(len(weight), dtype=torch.float64)
    for x, channels in parts:
        first = start.weight[channels].flatten(1) if not is_scale else start.weight[channels].reshape(1, 1)
        x, y, z = torch.cat(x), torch.cat(targets)[:, channels], torch.cat(linear)[:, channels]
        anchor = least_squares(x, z, first, ridge, shifted)
        fitted = least_squares(x, y, anchor, drift_ridge, shifted)
        if not is_scale:
            fitted = first + scaling_factor * (fitted - first)
        if norm:
            fitted = torch.stack([gain(x @ row, y[:, i], drift_ridge) * row for i, row in enumerate(fitted)])
        weight[channels] = fitted.reshape(weight[channels].shape)
        shifts[channels] = (y - x @ fitted.T).mean(0)
    module.weight.copy_(weight)
    if module.bias is not None:
        module.bias.copy_(shifts)
    if norm:
        after = merged.get_submodule(norm)
        after.bias += (
            after.weight * (shifts - (0 if module.bias is None else shifts)) / (after.running_var + after.eps).sqrt()
        )


def gain(x, y, ridge):
    """min (g x + b − y)² + ridge · x's square · (g − 1)²."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y + ridge * x @ x) / ((1 + ridge) * x @ x) if x.any() else torch.ones(())  # a channel may be dead


def seen(model, x):
    """Path -> the inputs of that module's calls."""
    found = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, path=path: found.setdefault(path, []).append(args[0].clone()))
        for path, m in model.named_modules()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def features(module, x):
    if isinstance(module, nn.Conv2d):
        return grouped_patches(x, module)
    if isinstance(module, nn.Linear):
        return [x.flatten(0, -2)]
    plain = copy.deepcopy(module)
    plain.weight.fill_(1), plain.bias.fill_(0)
    return as_rows(module, plain(x))


def as_rows(module, y):
    return y.movedim(1, -1).flatten(0, -2) if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) else y.flatten(0, -2)


def undone(norm, y):
    """What the BatchNorm made ``y`` of."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return ((y.movedim(1, -1) - norm.bias) / scale + norm.running_mean).movedim(-1, 1)


def least_squares(x, y, anchor, ridge, shifted):
    """min ‖x Wᵀ + b − y‖² + ridge · mean eigenvalue · ‖W − anchor‖², by QR on stacked rows."""
    if shifted:
        x, y = x - x.mean(0), y - y.mean(0)
    root = (ridge * x.square().sum() / x.shape[1]).sqrt()
    x = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(x, torch.cat([y, root * anchor.T]), driver="gels").solution.T


def check(base, data, order, norms={}, skips={}):
    base.eval()
    experts = make_experts(base)
    merged = compensate(base, experts, data).model
    expected = reference(copy.deepcopy(base), copy.deepcopy(experts), data, order, norms, skips, **OPTIONS)
    mean = merge("linear", base=base, experts=experts).model
    for x in data.values():
        exact = expected(x.double())
        assert relative_error(merged(x), exact) <= TOLERANCE
        assert relative_error(mean(x), exact) > 0.02  # the comparison can fail
    return merged


def randomise_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_convolutional_network():
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 5),
    )
    check(base, inputs(7, 3, 8, 8), ["0", "2", "4", "7"])


class ResidualBlock(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.expand, self.norm0 = nn.Conv2d(4, 10, 1, bias=bias), nn.BatchNorm2d(10)
        self.depthwise, self.norm1 = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=bias), nn.BatchNorm2d(10)
        self.project, self.norm2 = nn.Conv2d(10, 4, 1, bias=bias), nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu6(self.norm0(self.expand(x)))
        y = F.relu6(self.norm1(self.depthwise(y)))
        return x + self.norm2(self.project(y))


@pytest.mark.parametrize("bias", [False, True])
def test_residual_network_with_frozen_batch_norms(bias):
    torch.manual_seed(0)
    base = randomise_statistics(nn.Sequential(ResidualBlock(bias), ResidualBlock(bias)))
    pairs = (("expand", "norm0"), ("depthwise", "norm1"), ("project", "norm2"))
    norms = {f"{i}.{conv}": f"{i}.{norm}" for i in (0, 1) for conv, norm in pairs}
    skips = {f"{i}.project": f"{i}.expand" for i in (0, 1)}
    check(base, inputs(6, 4, 5, 5), list(norms), norms, skips)


def test_batch_norms_that_follow_no_layer():
    torch.manual_seed(0)
    base = randomise_statistics(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)))
    check(base, inputs(6, 4, 5, 5), ["0", "1", "3"])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 7), nn.Linear(6, 5, bias=False), nn.Linear(12, 4)
        self.gate = nn.Linear(6, 4)

    def forward(self, x):
        joined = torch.cat([torch.tanh(self.one(x)), torch.relu(self.two(x))], -1)
        return self.out(joined) * torch.sigmoid(self.gate(x))


def test_branching_network():
    torch.manual_seed(0)
    check(Branching(), inputs(40, 6), ["one", "two", "out", "gate"])


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A pre-norm transformer layer, written out."""

    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


LAYERS = ("norm1", *(f"attention.{name}" for name in ("q", "k", "v", "out")), "norm2", "up", "down")
SKIPS = {"attention.out": "norm1", "down": "norm2"}


def test_transformer():
    torch.manual_seed(0)
    base = nn.Sequential(Encoder(), Encoder())
    order = [f"{i}.{name}" for i in (0, 1) for name in LAYERS]
    skips = {f"{i}.{name}": f"{i}.{start}" for i in (0, 1) for name, start in SKIPS.items()}
    check(base, inputs(6, 5, 8), order, skips=skips)


def packed(encoder):
    """The same layer as torch's own, with its packed attention."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=F.gelu, batch_first=True, norm_first=True)
    state = encoder.state_dict()
    renamed = {
        "self_attn.out_proj": "attention.out",
        "norm1": "norm1",
        "norm2": "norm2",
        "linear1": "up",
        "linear2": "down",
    }
    layer.load_state_dict(
        {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in renamed.items() for kind in ("weight", "bias")}
        | {
            f"self_attn.in_proj_{kind}": torch.cat([state[f"attention.{name}.{kind}"] for name in "qkv"])
            for kind in ("weight", "bias")
        }
    )
    return layer.eval()


def test_packed_attention_is_what_it_is_written_out():
    torch.manual_seed(0)
    base, data = Encoder().eval(), inputs(6, 5, 8)
    experts = make_experts(base)
    plain = compensate(base, experts, data).model
    merged = compensate(packed(base), {name: packed(e) for name, e in experts.items()}, data).model
    expected = packed(plain).state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


def test_a_shared_module_is_solved_from_all_its_calls():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), shared, nn.Tanh(), shared).eval()
    experts, data = make_experts(base), inputs(30, 6)
    merged = compensate(base, experts, data).model
    assert merged[2] is merged[4]

    # At the first call only its own rows are known, at the second those of both.
    class FirstCall(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    doubled = copy.deepcopy(base).double(), {k: copy.deepcopy(e).double() for k, e in experts.items()}
    once = reference(FirstCall(*doubled[0]), {k: FirstCall(*e) for k, e in doubled[1].items()}, data, ["0", "2"])
    expected = nn.Sequential(*once)
    with torch.no_grad():
        solve(expected, *doubled, data, "2", {}, {}, *OPTIONS.values())
    for x in data.values():
        assert relative_error(merged(x), expected(x.double())) <= TOLERANCE


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


def test_the_base_is_kept_where_there_are_no_inputs():
    base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    experts = make_experts(base)
    data = {name: torch.cat([x, torch.zeros(50, 3)], 1) for name, x in inputs(50, 3).items()}
    merged = compensate(base, experts, data).model
    assert torch.equal(merged[0].weight[:, 3:], base[0].weight[:, 3:])
    assert not torch.equal(merged[0].weight[:, :3], base[0].weight[:, :3])


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
