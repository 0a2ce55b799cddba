"""Corruptions: reproducible, of the same form, stronger with severity, and each of its own kind."""

from __future__ import annotations

import numpy as np
import pytest

from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt


@pytest.fixture(params=[(48, 64), (48, 64, 3)], ids=["grey", "colour"])
def images(request):
    """Smooth pictures with edges."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    waves = 128 + 90 * np.sin(x / 7 + random.uniform(0, 6, (5, 1, 1))) * np.cos(y / 5)
    waves[:, 10:30, 20:40] = 230
    out = waves if len(request.param) == 2 else np.stack([waves, waves[:, ::-1], waves[..., ::-1]], -1)
    return out.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_form_and_strength(images, kind):
    before = images.copy()
    distances = []
    for severity in SEVERITIES:
        out = corrupt(images, kind, severity)
        assert out.shape == images.shape and out.dtype == np.uint8
        assert np.array_equal(out, corrupt(images, kind, severity))
        distances.append(np.abs(out.astype(float) - images).mean())
    assert np.array_equal(images, before)
    assert distances[0] > 0.5 and distances[4] > 1.5 * distances[0]
    assert all(later > 0.95 * earlier for earlier, later in zip(distances, distances[1:]))


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "spatter", "motion_blur"])
def test_the_seed_decides(images, kind):
    assert not np.array_equal(corrupt(images, kind, 3, seed=0), corrupt(images, kind, 3, seed=1))


def test_kinds_do_what_they_are_called(images):
    flat = np.full_like(images, 100)
    assert np.array_equal(corrupt(flat, "contrast", 5), flat) and np.array_equal(corrupt(flat, "pixelate", 5), flat)
    assert np.array_equal(corrupt(flat, "motion_blur", 5), flat)
    noise = corrupt(flat, "gaussian_noise", 1).astype(float) / 255
    assert abs(noise.std() - 0.06) < 0.003
    hit = corrupt(flat, "impulse_noise", 5)
    assert set(np.unique(hit)) == {0, 100, 255} and abs((hit != 100).mean() - 0.23) < 0.02
    covered = (corrupt(flat, "spatter", 3) != 100).mean()
    assert 0.1 < covered < 0.35
    contrast = corrupt(images, "contrast", 2).astype(float)
    assert abs(contrast[0].std() / images[0].astype(float).std() - 0.45) < 0.03
    blurred, gradient = corrupt(images, "motion_blur", 5), lambda x: np.abs(np.diff(x.astype(float), axis=2)).mean()
    assert gradient(blurred) < 0.8 * gradient(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fog", 1), "corruption: expected one of"),
        (("jpeg", 0), "severity: expected 1 to 5, got 0"),
        (("jpeg", 6), "severity: expected 1 to 5, got 6"),
    ],
)
def test_bad_settings(images, arguments, message):
    with pytest.raises(DataError, match=message):
        corrupt(images, *arguments)


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 1), np.uint8), np.array(["text"])])
def test_what_is_no_image(images):
    with pytest.raises(DataError, match="images: expected uint8"):
        corrupt(images, "jpeg", 1)
