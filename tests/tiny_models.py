"""Tiny models on disk for the tests of checkpoints, recipes and the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[UNK]", *"the disk of server is full and network slow again today".split())


def tiny_bert(vocabulary: int = 40, hidden: int = 16, seed: int = 0) -> BertModel:
    """A BERT with two layers and about 7,000 parameters."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    torch.manual_seed(seed)
    return BertModel(config).eval()


def save_tiny_bert(path: Path, *, model: BertModel | None = None, noise: float = 0.0, seed: int = 1, **saving) -> Path:
    """Save a tiny BERT (the one of seed 0), its weights moved by noise of that size, as a Hugging Face directory."""
    model = model or tiny_bert()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path, **saving)
    return path


def save_tiny_tokenizer(path: Path) -> None:
    """A tokenizer of a dozen words, in the directory of a model."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(path)


def files_in(directory: Path) -> list[str]:
    """Everything in a directory, hidden files too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
