"""Tiny models of the families of transformers, with experts and calibration samples, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 4}

FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=4)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=4, sliding_window=4)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**GROUPED, head_dim=4, sliding_window=4, sliding_window_pattern=2)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=50, n_positions=64)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=64)),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**SIZES, vocab_size=50, max_position_embeddings=64, pad_token_id=0)
    ),
    "t5": lambda: tf.T5EncoderModel(tf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, vocab_size=50)),
    "albert": lambda: tf.AlbertModel(tf.AlbertConfig(**SIZES, embedding_size=8, vocab_size=50)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGES, num_labels=3)),
    "clip vision": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**IMAGES, projection_dim=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=1, sliding_window=None)
    ),
    "qwen3 mixture": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **MIXTURE, num_experts=4, head_dim=4)),
}


def save_family(directory: Path, family: str, *, padding: str = "right", dtype=torch.float32, samples: int = 6) -> Path:
    """Base, experts "a" and "b", and samples of each in a.safetensors and b.safetensors, in one directory."""
    for number, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = FAMILIES[family]()
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.3 if not number else 0.05) * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(directory / name, **({"max_shard_size": "20KB"} if number == 2 else {}))
    for number, name in enumerate(("a", "b")):
        save_file(samples_of(model, padding, samples, seed=number), directory / f"{name}.safetensors")
    return directory


def save_deep(directory: Path, layers: int, experts: list[str]) -> Path:
    """A base of the family "llama" with many layers of some size, and experts that are all the same model, on disk."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 4}
    for number, name in enumerate(("base", experts[0])):
        torch.manual_seed(number)
        config = tf.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=4)
        tf.LlamaForCausalLM(config).save_pretrained(directory / name)
    for name in experts[1:]:
        (directory / name).symlink_to(directory / experts[0])
    return directory


def samples_of(model: nn.Module, padding: str, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Random inputs; texts of several lengths are padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}
    tokens = torch.randint(2, 50, (count, 9), generator=generator)
    lengths = torch.randint(4, 10, (count, 1), generator=generator)
    places = torch.arange(9).expand(count, 9)
    mask = (places < lengths if padding == "right" else places >= 9 - lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}
