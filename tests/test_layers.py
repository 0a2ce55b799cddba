"""Which layers are found in a model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from statsmerge_ext.layers import find_layers, layers_of_state


def by_name(model):
    return {layer.name: layer for layer in find_layers(model)}


def test_every_parameter_is_covered_once():
    model = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )
    layers = find_layers(model)
    assert [layer.parameter for layer in layers] == [name for name, _ in model.named_parameters()]
    kinds = {layer.name: layer.kind for layer in layers}
    assert kinds["encoder.layer.0.attention.self.query.weight"] == "linear"
    assert kinds["encoder.layer.0.output.LayerNorm.weight"] == "scale"
    assert kinds["encoder.layer.0.output.LayerNorm.bias"] == "bias"
    assert kinds["embeddings.word_embeddings.weight"] == "embedding"


def test_packed_attention_has_three_layers_that_cover_its_rows():
    layers = by_name(nn.MultiheadAttention(8, 2))
    parts = [layers[f"in_proj_weight[{letter}]"] for letter in "qkv"]
    assert [part.rows for part in parts] == [(0, 8), (8, 16), (16, 24)]
    assert [part.source for part in parts] == ["query", "key", "value"]
    assert layers["out_proj.weight"].source == "attention"


def test_attention_with_separate_projections():
    layers = by_name(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    assert [layers[f"{letter}_proj_weight"].source for letter in "qkv"] == ["query", "key", "value"]


def test_tied_weights_are_one_layer():
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    layers = by_name(LlamaForCausalLM(config))
    assert layers["model.embed_tokens.weight"].kind == "embedding"
    assert layers["model.embed_tokens.weight"].tied == ("lm_head.weight",)
    assert "lm_head.weight" not in layers
    assert layers["model.norm.weight"].kind == "scale"


def test_transposed_conv1d():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=20))
    layer = by_name(model)["transformer.h.0.attn.c_attn.weight"]
    weight = model.transformer.h[0].attn.c_attn.weight
    assert layer.transposed
    assert layer.matrices(weight).shape == (1, 48, 16)
    assert torch.equal(layer.from_matrices(layer.matrices(weight), weight.shape), weight)


def test_grouped_convolution_is_a_matrix_a_group():
    conv = nn.Conv2d(8, 12, 3, groups=4)
    (layer,) = (layer for layer in find_layers(conv) if layer.kind == "conv")
    assert layer.matrices(conv.weight).shape == (4, 3, 18)
    assert torch.equal(layer.from_matrices(layer.matrices(conv.weight), conv.weight.shape), conv.weight)


def test_bare_parameters_are_other():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.deconv = nn.ConvTranspose2d(2, 2, 3)

    layers = by_name(Model())
    assert layers["class_token"].kind == "other" and not layers["class_token"].source
    assert layers["deconv.weight"].kind == "other"
    assert layers["deconv.bias"].kind == "bias"


def test_shared_module_is_one_layer():
    shared = nn.Linear(4, 4)
    layers = find_layers(nn.Sequential(shared, nn.ReLU(), shared))
    assert [layer.name for layer in layers] == ["0.weight", "0.bias"]
    assert layers[0].tied == ("2.weight",)


def test_parametrised_weight_is_bare():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert {layer.kind for layer in find_layers(linear)} == {"other", "bias"}


def test_layers_of_a_bare_state_dict_leave_out_buffers():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    layers = layers_of_state(model.state_dict())
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("0.weight", "linear"),
        ("0.bias", "bias"),
        ("1.weight", "bias"),
        ("1.bias", "bias"),
    ]
