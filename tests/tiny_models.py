"""Tiny models on disk, and merging them by the command line, for the tests of everything that touches files."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from statsmerge_ext.checkpoints import Checkpoint, open_checkpoint
from statsmerge_ext.cli import main

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


def save_tiny_family(directory: Path) -> Path:
    """A base with a tokenizer, two experts "a" and "b" (one sharded), and texts.txt, in one directory."""
    save_tiny_bert(directory / "base")
    save_tiny_tokenizer(directory / "base")
    save_tiny_bert(directory / "a", noise=0.05, seed=1)
    save_tiny_bert(directory / "b", noise=0.05, seed=2, max_shard_size="8KB")
    (directory / "texts.txt").write_text("\n".join(" ".join(WORDS[2 + i % 5 : 8 + i % 7]) for i in range(20)))
    return directory


def write_recipe(directory: Path, method: str = "task_arithmetic", experts=("a", "b"), **content) -> Path:
    """recipe.yaml in the directory of a family; `content` holds further keys."""
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": name} for name in experts], **content}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory / "recipe.yaml"


def merge(directory: Path, *options: str, out: str = "out", **recipe) -> int:
    """Merge a family by `write_recipe`'s recipe and return the command's exit status."""
    return main(["merge", str(write_recipe(directory, **recipe)), str(directory / out), "--quiet", *options])


def assert_refused(directory: Path, capsys, *expected: str, options=(), **recipe) -> None:
    """The merge ends with status 2 and one line on stderr, and leaves the directory as it was."""
    write_recipe(directory, **recipe)
    before = files_in(directory)
    capsys.readouterr()
    assert merge(directory, *options, **recipe) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    for part in expected:
        assert part in output.err
    assert files_in(directory) == before


def states(directory: Path, *names: str) -> list[Checkpoint]:
    """The checkpoints of those names in a directory."""
    return [open_checkpoint(directory / name) for name in names]
