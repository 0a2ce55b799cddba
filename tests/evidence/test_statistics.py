"""Weight statistics of whole models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statsmerge_ext.evidence import WeightStatistics, collect_weight_statistics
from statsmerge_ext.layers import find_layers
from tests.closed_forms import make_experts


def models():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Linear(6, 4))
    return base, make_experts(base)


def collect(of):
    base, experts = models()
    states = {name: expert.state_dict() for name, expert in experts.items()}
    return collect_weight_statistics(find_layers(base), base.state_dict(), states, of=of)


@pytest.mark.parametrize("of", ["weights", "task_vectors"])
def test_statistics_of_each_layer(of):
    base, experts = models()
    statistics = collect(of)
    for column, expert in enumerate(experts.values()):
        for row, (name, parameter) in enumerate(expert.named_parameters()):
            x = parameter.detach().double()
            if of == "task_vectors":
                x = (parameter.detach() - base.get_parameter(name).detach()).double()
            singular = torch.linalg.svdvals(x.flatten(1)) if x.dim() > 1 else x.norm()[None]
            singular = torch.cat([singular, torch.zeros(3, dtype=torch.float64)])[:3]
            expected = torch.cat([torch.stack([x.mean(), x.var(correction=0), x.norm()]), singular])
            torch.testing.assert_close(statistics.values[row, column], expected, rtol=2e-3, atol=1e-6)


def test_model_wise_statistics_are_those_of_all_parameters_together():
    _, experts = models()
    statistics = collect("weights")
    for column, expert in enumerate(experts.values()):
        x = torch.cat([p.detach().double().flatten() for p in expert.parameters()])
        expected = torch.stack([x.mean(), x.var(correction=0), x.norm()])
        torch.testing.assert_close(statistics.model_wise()[column, :3], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(statistics.model_wise()[:, 3:], statistics.values[:, :, 3:].mean(0))


def test_save_and_load(tmp_path):
    statistics = collect("weights")
    statistics.save(tmp_path / "s.safetensors")
    loaded = WeightStatistics.load(tmp_path / "s.safetensors")
    assert (loaded.layers, loaded.experts, loaded.sizes, loaded.of) == (
        statistics.layers,
        statistics.experts,
        statistics.sizes,
        "weights",
    )
    assert torch.equal(loaded.values, statistics.values)


def test_unknown_subject():
    with pytest.raises(ValueError, match="of: expected one of .* got 'gradients'"):
        collect("gradients")
