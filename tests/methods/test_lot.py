"""LOT Merging's closed forms against float64 least squares on raw features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from statsmerge_ext import merge
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.errors import MethodError
from statsmerge_ext.evidence import collect_grams
from statsmerge_ext.layers import find_layers
from tests.closed_forms import (
    EXPERTS,
    Wrapper,
    fine_tuned,
    grouped_patches,
    least_squares,
    make_experts,
    relative_error,
)

TOLERANCE = 1e-4


def lot(base, experts, calibration, **options):
    options = {"scaling_factor": 1.0, "ridge": 0.0, **options}
    return merge("lot", base=base, experts=experts, calibration=calibration, **options)


def inputs(*shape, seed=0):
    return {
        name: torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed + k))
        for k, name in enumerate(EXPERTS)
    }


def task_vectors(base, experts, parameter):
    return [e.get_parameter(parameter).detach() - base.get_parameter(parameter).detach() for e in experts.values()]


@pytest.mark.parametrize("tokens", [200, 5])
def test_linear(tokens):
    base = Wrapper(nn.Linear(24, 10))
    experts, x = make_experts(base), inputs(tokens, 24)
    merged = lot(base, experts, {k: [v[:3], v[3:]] for k, v in x.items()}).model
    features = list(x.values())
    expected = least_squares(features, task_vectors(base, experts, "module.weight"))
    ours = merged.module.weight - base.module.weight
    for f in features:
        assert relative_error(f @ ours.T, f.double() @ expected.T) <= TOLERANCE


@pytest.mark.parametrize(
    "layer, shape", [(nn.Linear(24, 10), (5, 24)), (nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 5, 4))]
)
def test_ridge_is_a_part_of_each_groups_mean_eigenvalue(layer, shape):
    base, ridge = Wrapper(layer), 1e-2
    experts, x = make_experts(base), inputs(*shape)
    if isinstance(layer, nn.Conv2d):
        x = {name: value * torch.linspace(1, 100, 8)[:, None, None] for name, value in x.items()}
    merged = lot(base, experts, {k: [v] for k, v in x.items()}, ridge=ridge).model
    groups = getattr(layer, "groups", 1)
    ours = (merged.module.weight - base.module.weight).flatten(1).chunk(groups)
    moved = [t.flatten(1).chunk(groups) for t in task_vectors(base, experts, "module.weight")]
    features = [grouped_patches(v, layer) if groups > 1 else [v] for v in x.values()]
    for group in range(groups):
        grams = [f[group].double().T @ f[group].double() for f in features]
        product = sum(t[group].double() @ g for t, g in zip(moved, grams, strict=True))
        total = sum(grams)
        total.diagonal().add_(ridge * total.diagonal().mean())
        assert relative_error(ours[group], product @ torch.linalg.inv(total)) <= TOLERANCE


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ridge": -1.0}, "ridge: expected a number of at least 0, got -1.0"),
        ({"ridge": float("nan")}, "ridge: expected a number of at least 0, got nan"),
        ({"ridge": 1e-3, "rcond": 1e-6}, "rcond: expected None with a ridge, got 1e-06"),
    ],
)
def test_impossible_regularisation(options, message):
    base = Wrapper(nn.Linear(6, 4))
    with pytest.raises(MethodError, match=message):
        lot(base, make_experts(base), {k: [v] for k, v in inputs(3, 6).items()}, **options)


def test_linear_keeps_the_base_where_there_are_no_inputs():
    base = Wrapper(nn.Linear(6, 4))
    experts = make_experts(base)
    x = {k: torch.cat([v, torch.zeros(50, 3)], 1) for k, v in inputs(50, 3).items()}
    merged = lot(base, experts, {k: [v] for k, v in x.items()}).model
    assert torch.equal(merged.module.weight[:, 3:], base.module.weight[:, 3:])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(6, 9, (3, 2), stride=2, padding=(1, 0), dilation=(2, 1)),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.Conv2d(7, 5, 1),
    ],
    ids=["plain", "strided", "grouped", "depthwise", "pointwise"],
)
def test_convolution(conv):
    base = Wrapper(conv)
    experts, x = make_experts(base), inputs(4, conv.in_channels, 9, 8)
    merged = lot(base, experts, {k: [v] for k, v in x.items()}).model
    ours = (merged.module.weight - base.module.weight).flatten(1).chunk(conv.groups)
    moved = [t.flatten(1).chunk(conv.groups) for t in task_vectors(base, experts, "module.weight")]
    unfolded = [grouped_patches(v, conv) for v in x.values()]
    for group in range(conv.groups):
        features = [columns[group] for columns in unfolded]
        expected = least_squares(features, [t[group] for t in moved])
        for f in features:
            assert relative_error(f @ ours[group].T, f.double() @ expected.T) <= TOLERANCE


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("dims", [1, 3])
def test_convolution_of_other_dimensions(dims, padding_mode):
    """The merged convolution does what the best T would: compared through its outputs, as linear functions of T."""
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    conv = kind(2, 3, 3, padding="same", padding_mode=padding_mode, bias=False)
    base = Wrapper(conv)
    experts, x = make_experts(base), inputs(30, 2, *[5] * dims)
    merged = lot(base, experts, {k: [v] for k, v in x.items()}).model

    probe = kind(2, 2 * 3**dims, 3, padding="same", padding_mode=padding_mode, bias=False).double()
    with torch.no_grad():  # one output channel an entry of the kernel: its outputs are the patches
        probe.weight.copy_(torch.eye(2 * 3**dims).reshape(probe.weight.shape))
        features = [probe(v.double()).movedim(1, -1).flatten(0, -2) for v in x.values()]
    moved = [t.flatten(1) for t in task_vectors(base, experts, "module.weight")]
    expected = least_squares(features, moved)
    ours = (merged.module.weight - base.module.weight).flatten(1)
    for f in features:
        assert relative_error(f @ ours.double().T, f @ expected.T) <= TOLERANCE


def test_transposed_conv1d_of_transformers():
    base = Wrapper(Conv1D(10, 24))
    experts, x = make_experts(base), inputs(7, 6, 24)
    merged = lot(base, experts, {k: [v] for k, v in x.items()}).model
    features = [v.flatten(0, 1) for v in x.values()]
    expected = least_squares(features, [t.T for t in task_vectors(base, experts, "module.weight")])
    ours = merged.module.weight - base.module.weight
    for f in features:
        assert relative_error(f @ ours, f.double() @ expected.T) <= TOLERANCE


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention(batch_first):
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    base = Wrapper(attention, lambda module, x: module(x, x.flip(0), x * 2, need_weights=False)[0])
    experts, x = make_experts(base), inputs(5, 7, 16)
    merged = lot(base, experts, {k: [v] for k, v in x.items()}).model

    attended = []
    for expert, v in zip(experts.values(), x.values(), strict=True):
        q, k, value = (
            F.linear(part, w, b).double()
            for part, w, b in zip(
                (v, v.flip(0), v * 2),
                expert.module.in_proj_weight.chunk(3),
                expert.module.in_proj_bias.chunk(3),
                strict=True,
            )
        )
        if not batch_first:
            q, k, value = (part.transpose(0, 1) for part in (q, k, value))
        heads = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in (q, k, value)]
        output = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        attended.append(output.flatten(0, 1).detach())

    moved = [t.chunk(3) for t in task_vectors(base, experts, "module.in_proj_weight")]
    ours = (merged.module.in_proj_weight - base.module.in_proj_weight).chunk(3)
    views = [lambda v: v, lambda v: v.flip(0), lambda v: v * 2]
    for place, view in enumerate(views):
        features = [view(v).flatten(0, 1) for v in x.values()]
        expected = least_squares(features, [t[place] for t in moved])
        for f in features:
            assert relative_error(f @ ours[place].T, f.double() @ expected.T) <= TOLERANCE
    expected = least_squares(attended, task_vectors(base, experts, "module.out_proj.weight"))
    ours = (merged.module.out_proj.weight - base.module.out_proj.weight).double()
    for f in attended:
        assert relative_error(f @ ours.T, f @ expected.T) <= TOLERANCE


def normalised_reference(module, x):
    """The normalised input by the textbook, in float64, with channels last."""
    x = x.double()
    if isinstance(module, LlamaRMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    if isinstance(module, nn.RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt()
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    if isinstance(module, nn.GroupNorm):
        grouped = x.unflatten(1, (module.num_groups, -1)).flatten(2)
        centred = grouped - grouped.mean(2, keepdim=True)
        return (centred / (centred.square().mean(2, keepdim=True) + module.eps).sqrt()).reshape(x.shape).movedim(1, -1)
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, variance = module.running_mean.double().view(shape), module.running_var.double().view(shape)
    return ((x - mean) / (variance + module.eps).sqrt()).movedim(1, -1)


def batch_norm():
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (8, 5, 6)),
        (nn.RMSNorm(6, eps=1e-6), (8, 5, 6)),
        (LlamaRMSNorm(6), (8, 5, 6)),
        (nn.GroupNorm(2, 6), (8, 6, 4, 4)),
        (batch_norm(), (8, 6, 4, 4)),
    ],
    ids=["layer", "rms", "llama", "group", "batch"],
)
def test_norm_scale_and_shift(norm, shape):
    base = Wrapper(norm).eval()
    experts, x = make_experts(base), inputs(*shape)
    merged = lot(base, experts, {k: [v] for k, v in x.items()}).model
    squares = [normalised_reference(norm, v).square().flatten(0, -2).sum(0) for v in x.values()]
    moved = task_vectors(base, experts, "module.weight")
    expected = sum(s * t for s, t in zip(squares, moved, strict=True)) / sum(squares)
    assert relative_error(merged.module.weight - base.module.weight, expected) <= TOLERANCE
    if getattr(norm, "bias", None) is not None:
        mean = torch.stack(task_vectors(base, experts, "module.bias")).double().mean(0)
        assert relative_error(merged.module.bias - base.module.bias, mean) <= TOLERANCE


def test_embedding_rows_are_weighted_by_counts_and_unseen_rows_take_the_mean():
    base = Wrapper(nn.Embedding(12, 5), lambda module, x: module(x))
    experts = make_experts(base)
    tokens = {
        name: torch.randint(0, 10, (6, 7), generator=torch.Generator().manual_seed(k)) for k, name in enumerate(EXPERTS)
    }
    merged = lot(base, experts, {k: [v] for k, v in tokens.items()}).model
    one_hot = [F.one_hot(v.flatten(), 12).double() for v in tokens.values()]
    moved = task_vectors(base, experts, "module.weight")
    expected = least_squares(one_hot, [t.T for t in moved]).T
    ours = merged.module.weight - base.module.weight
    seen = sum(o.sum(0) for o in one_hot) > 0
    assert not seen.all()
    assert relative_error(ours[seen], expected[seen]) <= TOLERANCE
    assert relative_error(ours[~seen], torch.stack(moved).mean(0)[~seen]) <= TOLERANCE


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
        nn.Linear(96, 4),
    ).eval()


def test_zero_task_vectors_give_the_base_bit_for_bit():
    base = small_network()
    with torch.no_grad():
        base[0].weight.view(-1)[0] = -0.0
    x = {"a": [torch.randn(9, 3, 6, 6)], "b": [torch.randn(9, 3, 6, 6)]}
    merged = lot(base, {"a": base, "b": base}, x, scaling_factor=1.2)
    for key, value in base.state_dict().items():
        assert merged.state[key].numpy().tobytes() == value.numpy().tobytes(), key


def test_one_expert_gives_its_outputs_on_its_calibration_data():
    base = small_network()
    expert, x = fine_tuned(base, 1), torch.randn(20, 3, 6, 6)
    merged = lot(base, {"a": expert}, {"a": [x]}).model
    assert relative_error(merged(x), expert(x)) <= TOLERANCE


def test_identical_experts_give_the_expert():
    base = small_network()
    expert, x = fine_tuned(base, 1), torch.randn(300, 3, 6, 6)
    experts = {"a": expert.state_dict(), "b": expert.state_dict()}
    evidence = collect_grams(
        base,
        find_layers(base),
        base.state_dict(),
        experts,
        {"a": [x[:150]], "b": [x[150:]]},
        forward=default_forward,
        gram_dtype=torch.float64,
    )
    merged = lot(base, experts, None, evidence=evidence).model
    for key, value in expert.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_scaling_factor_multiplies_the_task_vector():
    base = small_network()
    experts = make_experts(base)
    x = {k: [v] for k, v in inputs(9, 3, 6, 6).items()}
    once, twice = (lot(base, experts, x, scaling_factor=s).state for s in (0.5, 1.0))
    for key, value in base.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(2 * (once[key] - value), twice[key] - value, rtol=1e-4, atol=1e-6)
