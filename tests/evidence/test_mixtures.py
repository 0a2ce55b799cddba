"""Mixtures of experts whose weights are stacked in one parameter: each expert's own tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import statsmerge_ext
from statsmerge_ext.evidence import collect_grams
from statsmerge_ext.layers import find_layers

EXPERTS = 8
STACK = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def models() -> list[MixtralForCausalLM]:
    config = MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    made = [MixtralForCausalLM(config).eval()]
    for _ in range(2):
        made.append(copy.deepcopy(made[0]))
        with torch.no_grad():
            for parameter in made[-1].parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return made


def batches() -> dict[str, list[torch.Tensor]]:
    tokens = torch.randint(30, (2, 1, 3), generator=torch.Generator().manual_seed(1))
    return {"a": [tokens[0]], "b": [tokens[1]]}


def tokens_of_experts(model: MixtralForCausalLM, batch: torch.Tensor) -> list[torch.Tensor]:
    """What each expert of the first block is given, in float64."""
    seen = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(batch)
    handle.remove()
    hidden, chosen, _ = seen[0]
    return [hidden[(chosen == place).any(-1)].double() for place in range(EXPERTS)]


def test_each_expert_has_the_gram_matrix_of_its_own_tokens(models):
    base, *experts = models
    states = dict(zip("ab", (model.state_dict() for model in experts), strict=True))
    layers = find_layers(base)
    forward = type(base).__call__
    evidence = collect_grams(copy.deepcopy(base), layers, base.state_dict(), states, batches(), forward=forward)
    tokens = [tokens_of_experts(model, batches()[name][0]) for name, model in zip("ab", experts, strict=True)]
    for place in range(EXPERTS):
        name = f"{STACK}[{place}]"
        gram = sum(x[place].T @ x[place] for x in tokens)
        assert (name in evidence.leaders) == bool(gram.any())
        if gram.any():
            assert evidence.grams[evidence.leaders[name]].shape == (1, 16, 16)
            torch.testing.assert_close(evidence.grams[evidence.leaders[name]][0].double(), gram, rtol=1e-5, atol=1e-6)
    assert "model.layers.0.mlp.gate.weight" in evidence.leaders


def test_an_expert_without_tokens_keeps_the_mean_and_the_report_says_so(models):
    base, *experts = models
    named = dict(zip("ab", experts, strict=True))
    result = statsmerge_ext.merge("lot", base=base, experts=named, calibration=batches(), scaling_factor=1.0)
    tokens = [tokens_of_experts(model, batches()[name][0]) for name, model in named.items()]
    idle = [place for place in range(EXPERTS) if not sum(len(x[place]) for x in tokens)]
    assert 0 < len(idle) < EXPERTS
    never = result.report["layers"]["never_called"]
    assert [name for name in never if name.startswith(STACK)] == [f"{STACK}[{place}]" for place in idle]
    mean = sum(model.state_dict()[STACK] for model in experts) / 2
    merged = result.state[STACK]
    for place in range(EXPERTS):
        apart = (merged[place] - mean[place]).abs().max()
        assert apart < 1e-6 if place in idle else apart > 1e-4
