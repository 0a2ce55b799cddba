"""vit8: a small vision transformer, distilled from vision8's EfficientNet-Lite0, on the same eight image tasks."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import statsmerge_ext
from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.suites.definition import SuiteDefinition, TrainingSettings
from statsmerge_ext.evaluation.suites.vision8 import SIDE, shift, vision8

PATCH = 8
WIDTH = 192
DEPTH = 6
HEADS = 3
FEATURES = 1280  # EfficientNet-Lite0's

BASE = Path(statsmerge_ext.__file__).parent / "assets" / "vit8" / "base.safetensors"


class Block(nn.Module):
    """Attention and a perceptron, each on normalised tokens [N, T, d] and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # [N, T, 3 d] -> three of [N, heads, T, d / heads]
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.projection(attended)
        return tokens + self.down(F.gelu(self.up(self.norm2(tokens))))


class VisionTransformer(nn.Module):
    """Images [N, 3, side, side] -> features [N, features]: the normalised tokens' mean, mapped linearly."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, features: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.features = nn.Linear(width, features)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.features(self.norm(self.blocks(tokens)).mean(1))


def untrained() -> VisionTransformer:
    """The architecture of the base with random weights, drawn from torch's generator."""
    return VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, FEATURES)


def load_base() -> nn.Module:
    """The distilled transformer (scripts/distill_base.py made it), float32; its weights are float16 numbers.

    Raises DataError when its file is missing or damaged.
    """
    with torch.device("meta"):
        model = untrained()
    try:
        state = {key: value.float() for key, value in safetensors.torch.load_file(BASE).items()}
        model.load_state_dict(state, assign=True)
    except Exception as error:  # safetensors and torch each have their own for damaged or foreign content
        raise DataError(f"{BASE}: the base of suite vit8 cannot be read: {error}") from error
    return model.eval()


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    """Features [N, 1280], in the place of EfficientNet-Lite0's."""
    return model(batch)


vit8 = SuiteDefinition(
    name="vit8",
    datasets=vision8.datasets,
    load_base=load_base,
    forward=forward,
    encode=vision8.encode,
    training=TrainingSettings(
        epochs=12, lr=2e-4, batch_size=16, weight_decay=0.05, augment=shift, bfloat16=True, step=0.7
    ),
    # Distilled features lie closer together than their teacher's: cosines of prototypes are 0.87 where those are 0.77.
    logit_scale=100.0,
    distilled_from=vision8.name,
)
