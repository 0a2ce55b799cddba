"""Tests that need an NVIDIA GPU. Everything in this folder has the marker `cuda`; without a GPU it is not selected."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_cuda, has_cupy = torch.cuda.is_available(), importlib.util.find_spec("cupy") is not None
    kept, dropped = [], []
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            runs = has_cuda and (has_cupy or item.get_closest_marker("cupy") is None)
            (kept if runs else dropped).append(item)
        else:
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
