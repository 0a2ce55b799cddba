"""What becomes of layers' outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from statsmerge_ext.engine.dataflow import trace_dataflow
from statsmerge_ext.layers import find_layers


def trace(model, x):
    return trace_dataflow(model, find_layers(model), lambda m, b: m(**b) if isinstance(b, dict) else m(b), x)


class Block(nn.Module):
    """x + f(x), in one of several ways to write it."""

    def __init__(self, add, inplace=False):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.drop = nn.Dropout(0.5)
        self.add = add

    def forward(self, x):
        return self.relu(self.add(x, self.drop(self.norm2(self.second(self.relu(self.norm1(self.first(x))))))))


@pytest.mark.parametrize(
    "add",
    [lambda x, y: x + y, lambda x, y: y + x, lambda x, y: torch.add(x, y), lambda x, y: y.add_(x)],
    ids=["left", "right", "function", "in place"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_norms_and_residuals_of_a_block(add, inplace):
    flows = trace(nn.Sequential(Block(add, inplace), Block(add, inplace)).eval(), torch.randn(1, 4, 5, 5))
    assert [flow.norm and flow.norm.name for flow in flows.values()] == [
        f"{i}.norm{n}.weight" if n else None for i in (0, 1) for n in (1, None, 2, None)
    ]
    assert {name: flow.skip for name, flow in flows.items() if flow.skip} == {
        f"{i}.{name}.weight": f"{i}.first.weight" for i in (0, 1) for name in ("second", "norm2")
    }


def test_a_residual_that_was_changed_meanwhile_is_none():
    flows = trace(nn.Sequential(Block(lambda x, y: x.mul_(2) + y), nn.Flatten()).eval(), torch.randn(1, 4, 5, 5))
    assert not any(flow.skip for flow in flows.values())


@pytest.mark.parametrize("add", [lambda x, y: x - y, lambda x, y: torch.add(x, y, alpha=2), lambda x, y: x + 2 * y])
def test_other_sums_are_no_residuals(add):
    flows = trace(nn.Sequential(Block(add)).eval(), torch.randn(1, 4, 5, 5))
    assert not any(flow.skip for flow in flows.values())


def test_a_norm_with_statistics_of_its_batch_is_none_to_fuse():
    block = Block(torch.add).eval()
    block.norm1.train()
    flows = trace(block, torch.randn(2, 4, 5, 5))
    assert flows["first.weight"].norm is None and flows["second.weight"].norm is not None


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_of_torch(norm_first):
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=norm_first).eval()
    flows = trace(model, torch.randn(2, 3, 8))
    first, second = ("norm1", "norm2") if norm_first else ("self_attn.in_proj", "linear1")
    assert flows["self_attn.out_proj.weight"].skip.startswith(first)
    assert flows["linear2.weight"].skip.startswith(second)


def test_transformer_of_transformers():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    flows = trace(BertModel(config).eval(), {"input_ids": torch.arange(9).view(1, 9)})
    for i in (0, 1):
        block = f"encoder.layer.{i}"
        assert flows[f"{block}.attention.output.dense.weight"].skip == f"{block}.attention.self.query.weight"
        assert flows[f"{block}.output.dense.weight"].skip == f"{block}.intermediate.dense.weight"


def test_calls_are_counted():
    linear = nn.Linear(3, 3)
    flows = trace(nn.Sequential(linear, nn.Tanh(), linear, nn.Linear(3, 3)).eval(), torch.randn(1, 3))
    assert {name: flow.calls for name, flow in flows.items()} == {"0.weight": 2, "3.weight": 1}


@pytest.mark.parametrize(("norm", "offset"), [(GemmaRMSNorm(4), 1), (LlamaRMSNorm(4), 0), (nn.LayerNorm(4), 0)])
def test_offset_of_a_scale(norm, offset):
    assert trace(nn.Sequential(norm), torch.randn(2, 4))["0.weight"].offset == offset
