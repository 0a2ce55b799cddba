"""Corruptions of images, seven kinds at five severities, after those that robustness is usually measured with.

All take uint8 images [N, h, w] or [N, h, w, 3] and give the same; strengths are meant for images of about 64 pixels and
lengths scale with the side. Everything random comes from a seed.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from statsmerge_ext.errors import DataError

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: np.ndarray, kind: str, severity: int, seed: int = 0) -> np.ndarray:
    """``images`` corrupted.

    Args:
        images: uint8 [N, h, w] or [N, h, w, 3].
        kind: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: of everything random.

    Raises:
        DataError: an unknown kind or severity, or something that is no image.
    """
    if kind not in CORRUPTIONS:
        raise DataError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise DataError(f"severity: expected 1 to 5, got {severity}")
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
        got = f"{images.dtype} of shape {list(images.shape)}"
        raise DataError(f"images: expected uint8 [N, h, w] or [N, h, w, 3], got {got}")
    values = images[..., None] if grey else images
    out = CORRUPTIONS[kind](values.astype(np.float32) / 255, severity - 1, np.random.default_rng(seed))
    out = (out.clip(0, 1) * 255).round().astype(np.uint8)
    return out[..., 0] if grey else out


def _gaussian_noise(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    return x + random.normal(0, (0.06, 0.1, 0.15, 0.21, 0.28)[level], x.shape)


def _impulse_noise(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    """Single values become 0 or 1."""
    hit = random.random(x.shape) < (0.02, 0.05, 0.09, 0.15, 0.23)[level]
    return np.where(hit, random.integers(0, 2, x.shape), x)


def _contrast(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    mean = x.mean((1, 2), keepdims=True)
    return mean + (0.6, 0.45, 0.3, 0.2, 0.12)[level] * (x - mean)


def _motion_blur(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    """A line of its own direction for each image, smeared along."""
    side = max(x.shape[1:3])
    length = (0.07, 0.1, 0.14, 0.19, 0.25)[level] * side
    reach = int(np.ceil(length / 2))
    angles = random.uniform(0, np.pi, len(x))
    offsets = np.linspace(-length / 2, length / 2, 2 * reach + 1)
    kernels = np.zeros((len(x), 1, 2 * reach + 1, 2 * reach + 1), np.float32)
    for kernel, angle in zip(kernels, angles, strict=True):
        rows = np.rint(reach + offsets * np.sin(angle)).astype(int)
        columns = np.rint(reach + offsets * np.cos(angle)).astype(int)
        kernel[0, rows, columns] = 1
        kernel /= kernel.sum()
    planes = torch.from_numpy(x).permute(3, 0, 1, 2)  # one group a image, colours as the batch
    padded = F.pad(planes, (reach,) * 4, mode="replicate")
    return F.conv2d(padded, torch.from_numpy(kernels), groups=len(x)).permute(1, 2, 3, 0).numpy()


def _pixelate(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    size = [max(2, round((0.55, 0.42, 0.34, 0.27, 0.2)[level] * side)) for side in x.shape[1:3]]
    small = F.interpolate(planes, size=size, mode="area")
    return F.interpolate(small, size=x.shape[1:3], mode="nearest").permute(0, 2, 3, 1).numpy()


def _spatter(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    """Drops of grey mud: where smooth noise is high."""
    share = (0.04, 0.08, 0.13, 0.19, 0.26)[level]
    noise = torch.from_numpy(random.normal(size=(len(x), 1, *x.shape[1:3])).astype(np.float32))
    reach = max(1, round(0.03 * max(x.shape[1:3])))
    for _ in range(3):
        noise = F.avg_pool2d(F.pad(noise, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    noise = noise[:, 0].numpy()
    threshold = np.quantile(noise, 1 - share, axis=(1, 2), keepdims=True)
    spread = noise.std((1, 2), keepdims=True) + 1e-12
    cover = np.clip((noise - threshold) / (0.3 * spread) + 0.5, 0, 1)[..., None]
    return x * (1 - cover) + 0.35 * cover


def _jpeg(x: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    from PIL import Image

    quality = (40, 25, 16, 10, 6)[level]
    out = np.empty_like(x)
    for place, image in enumerate((x * 255).round().astype(np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "JPEG", quality=quality)
        decoded = np.asarray(Image.open(buffer), np.float32) / 255
        out[place] = decoded.reshape(image.shape)
    return out


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "motion_blur": _motion_blur,
    "impulse_noise": _impulse_noise,
    "gaussian_noise": _gaussian_noise,
    "pixelate": _pixelate,
    "spatter": _spatter,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
