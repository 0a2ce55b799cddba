"""The vision transformer of vit8 and its shipped base."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.suites.vision8 import vision8
from statsmerge_ext.evaluation.suites.vit8 import BASE, VisionTransformer, vit8
from statsmerge_ext.layers import find_layers


def small_transformer():
    torch.manual_seed(0)
    return VisionTransformer(side=16, patch=4, width=24, depth=2, heads=2, features=10).eval()


def reference(model, images, heads):
    """The features by their formulas, a head at a time, in the images' dtype."""
    weights = {key: value.to(images.dtype) for key, value in model.state_dict().items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalised(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    kernel = weights["patches.weight"]
    side = kernel.shape[-1]
    rows = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = rows @ kernel.flatten(1).T + weights["patches.bias"] + weights["position"]
    for i in range(len(model.blocks)):
        query, key, value = linear(normalised(x, f"blocks.{i}.norm1"), f"blocks.{i}.qkv").chunk(3, -1)
        parts = []
        for q, k, v in zip(*(y.chunk(heads, -1) for y in (query, key, value)), strict=True):
            parts.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        x = x + linear(torch.cat(parts, -1), f"blocks.{i}.projection")
        hidden = linear(normalised(x, f"blocks.{i}.norm2"), f"blocks.{i}.up")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, f"blocks.{i}.down")
    return linear(normalised(x, "norm").mean(1), "features")


def test_the_transformer_is_its_formulas():
    model, images = small_transformer(), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = reference(model, images.double(), heads=2)
        plain_error = (reference(model, images, heads=2) - exact).abs().max()
        error = (model(images) - exact).abs().max()
    assert error <= 2 * plain_error + 1e-6
    assert exact.std() > 0.05


def test_every_parameter_but_positions_and_biases_has_evidence():
    layers = find_layers(small_transformer())
    assert {layer.name for layer in layers if layer.kind == "other"} == {"position"}
    assert {layer.kind for layer in layers} == {"other", "conv", "scale", "linear", "bias"}


def test_the_shipped_base():
    stored = safetensors.torch.load_file(BASE)
    base = vit8.load_base()
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert 2.9e6 < sum(value.numel() for value in base.parameters()) < 3.1e6
    assert all(torch.equal(value, stored[key].float()) for key, value in base.state_dict().items())
    with torch.no_grad():
        features = vit8.forward(base, vit8.encode(torch.zeros(2, 28, 28, dtype=torch.uint8).numpy()))
    assert features.shape == (2, 1280) and torch.equal(features[0], features[1])


def draw(letter):
    """A capital as in the data set of letters, in a font that comes with Pillow."""
    canvas = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(canvas).text((32, 32), letter, font=ImageFont.load_default(44), fill=0, anchor="mm")
    return np.asarray(canvas)


def test_the_base_gives_the_features_of_its_teacher():
    batch = vit8.encode(np.stack([draw(letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]))
    with torch.no_grad():
        mine, theirs = (F.normalize(suite.forward(suite.load_base(), batch)) for suite in (vit8, vision8))
    cosines = mine @ theirs.T
    assert cosines.diag().mean() > 0.8 and cosines.diag().mean() > cosines.mean() + 0.1


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_base_that_is_missing_or_damaged(content, tmp_path, monkeypatch):
    path = tmp_path / "base.safetensors"
    monkeypatch.setattr(sys.modules[VisionTransformer.__module__], "BASE", path)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="base.safetensors: the base of suite vit8 cannot be read"):
        vit8.load_base()
