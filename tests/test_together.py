"""Batches run as one and taken apart again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from statsmerge_ext import merge
from statsmerge_ext.engine.together import groups, join, take_apart
from tests.closed_forms import make_experts


def test_only_what_is_alike_is_joined():
    image, longer = torch.zeros(3, 2), torch.zeros(3, 4)
    text = {"ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.zeros(2, 5)}
    assert groups([image, longer, image, text, image.double(), text, longer], 100) == [[0, 2], [1, 6], [3, 5], [4]]


def test_groups_have_at_most_so_many_samples_but_no_batch_is_cut():
    batches = [torch.zeros(n, 2) for n in (3, 3, 3, 9, 1, 1)]
    assert groups(batches, 6) == [[0, 1], [2], [3], [4, 5]]
    assert groups(batches, 1) == [[i] for i in range(6)]


@pytest.mark.parametrize("one", [torch.arange(10.0).view(5, 2), {"x": torch.arange(10).view(5, 2), "y": torch.rand(5)}])
def test_join_and_take_apart_are_inverse(one):
    parts = take_apart(one, [2, 3])
    assert [len(part if isinstance(part, torch.Tensor) else part["x"]) for part in parts] == [2, 3]
    again = join(parts)
    for key in one if isinstance(one, dict) else [slice(None)]:
        assert torch.equal(again[key], one[key])


def test_outputs_of_transformers_are_taken_apart():
    hidden = torch.rand(5, 4, 3)
    output = BaseModelOutputWithPooling(hidden, hidden[:, 0], hidden_states=(hidden, hidden + 1), attentions=None)
    first, second = take_apart(output, [1, 4])
    assert isinstance(second, BaseModelOutputWithPooling) and second.attentions is None
    assert torch.equal(first.pooler_output, hidden[:1, 0]) and torch.equal(second.hidden_states[1], hidden[1:] + 1)
    with pytest.raises(TypeError, match="got object"):
        take_apart(object(), [1, 1])


@pytest.mark.parametrize("method", ["stats_merging", "adamerging"])
def test_coefficients_do_not_depend_on_what_is_run_at_once(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double().eval()
    experts = make_experts(base)
    calibration = {
        name: [torch.randn(3 + k, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64)] * 2
        for k, name in enumerate(experts)
    }
    calls = []
    base[0].register_forward_hook(lambda module, args, output: calls.append(len(output)))

    def learn(together):
        calls.clear()
        options = {"epochs": 4, "lr": 1e-2, "together": together}
        values = merge(method, base=base, experts=experts, calibration=calibration, **options).coefficients["values"]
        return values, calls[-3:]

    alone, sizes = learn(1)
    assert sizes == [3, 4, 5]
    for together, expected in ((7, [7, 5]), (64, [12])):
        values, sizes = learn(together)
        assert sizes[-len(expected) :] == expected
        torch.testing.assert_close(values, alone, rtol=1e-6, atol=1e-8)
