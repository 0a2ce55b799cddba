"""Experts that do not fit their base are refused, with the file, the tensor and what was expected named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from statsmerge_ext.checkpoints import check_compatible, check_finite, open_checkpoint
from statsmerge_ext.errors import CheckpointError
from tests.tiny_models import save_tiny_bert, tiny_bert

BASE = {"w": torch.ones(3, 2), "b": torch.zeros(3), "ids": torch.arange(4)}


def refusal(base, expert, name="x"):
    with pytest.raises(CheckpointError) as caught:
        check_compatible(base, {name: expert})
    return str(caught.value)


@pytest.fixture
def base(tmp_path):
    return open_checkpoint(save_tiny_bert(tmp_path / "base"))


def test_fine_tuned_siblings_fit(tmp_path, base):
    expert = open_checkpoint(save_tiny_bert(tmp_path / "expert", noise=0.1, max_shard_size="8KB"))
    aligned = check_compatible(base, {"x": expert})["x"]
    assert list(aligned) == list(base)
    assert all(torch.equal(aligned[name], expert[name]) for name in base)
    assert aligned.path == expert.path


def test_other_floating_dtypes_and_integer_tensors_are_no_obstacle():
    expert = {"w": BASE["w"].bfloat16(), "b": BASE["b"].double(), "counter": torch.tensor(3)}
    assert list(check_compatible(BASE, {"x": expert})["x"]) == ["w", "b"]


def test_no_expert():
    with pytest.raises(CheckpointError, match="experts: none given"):
        check_compatible(BASE, {})


def test_missing_tensors():
    assert refusal(BASE, {"w": BASE["w"]}) == "expert 'x': lacks tensor 'b' of the base"
    many = {f"w{i}": torch.ones(1) for i in range(7)}
    assert "lacks 7 tensors ('w0', 'w1', 'w2', 'w3' and 3 more)" in refusal(many, {"ids": torch.arange(2)})


def test_unexpected_tensors():
    assert refusal(BASE, {**BASE, "head": torch.ones(2)}) == "expert 'x': has tensor 'head', which the base lacks"


def test_equal_vectors_do_not_stand_in_for_a_missing_one():
    base = {"w": torch.ones(2, 2), "b1": torch.zeros(2), "b2": torch.zeros(2)}
    assert "lacks tensor 'b2'" in refusal(base, {"w": torch.ones(2, 2), "b1": torch.zeros(2)})


def test_vectors_that_are_tied():
    bias = torch.randn(3)
    once = {"w": torch.ones(2, 2), "b1": bias.clone()}
    assert list(check_compatible({**once, "b2": bias}, {"x": once})["x"]) == ["w", "b1", "b2"]
    zeros = torch.zeros(3)  # of a model in memory: equal by chance, but the same tensor
    fitting = check_compatible({"b1": zeros, "b2": zeros}, {"x": {"b1": torch.arange(3.0)}})["x"]
    assert torch.equal(fitting["b2"], torch.arange(3.0))
    assert "lacks tensor 'b2'" in refusal({"b1": zeros, "b2": zeros.clone()}, {"b1": torch.arange(3.0)})


def test_other_shapes():
    message = refusal(BASE, {**BASE, "w": torch.ones(2, 3)})
    assert message == "expert 'x': tensor 'w' has shape [2, 3], expected [3, 2] as in the base"


def test_integers_for_floating_point_and_the_reverse():
    assert "tensor 'w' is torch.int8, expected floating point" in refusal(BASE, {**BASE, "w": BASE["w"].char()})
    assert "tensor 'ids' is torch.float32, expected torch.int64" in refusal(BASE, {**BASE, "ids": torch.ones(4)})


def test_other_vocabulary(tmp_path, base):
    expert = open_checkpoint(save_tiny_bert(tmp_path / "expert", model=tiny_bert(vocabulary=43)))
    message = refusal(base, expert)
    assert str(tmp_path / "expert" / "model.safetensors") in message
    assert (
        "another vocabulary size: tensor 'embeddings.word_embeddings.weight' has 43 rows, the base's has 40" in message
    )
    assert "merge the common part with vocab: common" in message


def test_other_vocabulary_is_seen_without_configurations():
    base = {"lm_head.weight": torch.ones(10, 4)}
    assert "another vocabulary size" in refusal(base, {"lm_head.weight": torch.ones(11, 4)})
    assert "has shape [10, 5]" in refusal(base, {"lm_head.weight": torch.ones(10, 5)})


def test_other_width_is_no_vocabulary(tmp_path, base):
    expert = open_checkpoint(save_tiny_bert(tmp_path / "expert", model=tiny_bert(hidden=32)))
    message = refusal(base, expert)
    assert "has shape [32], expected [16] as in the base" in message
    assert "vocabulary" not in message


def test_another_architecture(tmp_path, base):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    message = refusal(base, open_checkpoint(tmp_path / "gpt"))
    assert (
        f"expert 'x' ({tmp_path / 'gpt'}): is another architecture (model_type 'gpt2', the base is 'bert')" in message
    )


@pytest.fixture
def tied(tmp_path):
    """A GPT-2, whose output layer is its token embedding: transformers stores it once."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40, n_positions=8)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "once")
    twice = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(twice, tmp_path / "twice.safetensors")
    once, twice = open_checkpoint(tmp_path / "once"), open_checkpoint(tmp_path / "twice.safetensors")
    assert set(twice) - set(once) == {"lm_head.weight"}
    return once, twice


def test_tied_weights_stored_twice_fit_those_stored_once(tied):
    once, twice = tied
    assert set(check_compatible(once, {"x": twice})["x"]) == set(once)
    aligned = check_compatible(twice, {"x": once})["x"]
    assert torch.equal(aligned["lm_head.weight"], once["transformer.wte.weight"])


def test_an_untied_head_is_not_taken_for_a_tied_one(tied):
    once, twice = tied
    untied = {**twice, "lm_head.weight": twice["lm_head.weight"] + 1}
    assert "has tensor 'lm_head.weight', which the base lacks" in refusal(once, untied)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value):
    tensor = torch.ones(3, 3, dtype=torch.bfloat16)
    assert check_finite("w", tensor, "here") is tensor
    tensor[1, 2] = value
    with pytest.raises(CheckpointError, match=r"a/b.pt: tensor 'w' holds \d NaN and \d infinite values"):
        check_finite("w", tensor, "a/b.pt")
    integers = torch.arange(3)
    assert check_finite("n", integers, "here") is integers
