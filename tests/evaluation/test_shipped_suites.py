"""The suites that come with the package: what their bases are fed, and the experts that are shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import statsmerge_ext
from statsmerge_ext.evaluation.studies.cases import LABELLED
from statsmerge_ext.evaluation.suites import get_suite, list_suites
from statsmerge_ext.evaluation.suites.vision8 import MEAN, STD, encode, shift
from statsmerge_ext.methods import get_method

ASSETS = Path(statsmerge_ext.__file__).parent / "assets"
# By how much an expert must beat the base on its task, on average.
MARGINS = {"vision8": 0.20, "text8": 0.08, "vit8": 0.15, "vision4": 0.20}


def tasks_of(name):
    return {dataset.name for dataset in get_suite(name).definition.datasets}


def ships(name):
    suite = get_suite(name)
    made = set(suite.provenance.get("tasks", {}))
    return made == tasks_of(name) == {path.stem for path in suite.assets.glob("*.npz")}


SHIPPED = [name for name in list_suites() if ships(name)]


def test_every_suite_ships_its_experts():
    assert SHIPPED == list_suites() == list(MARGINS)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experts_fit_the_base(name):
    suite = get_suite(name)
    base = suite.load_base()
    assert isinstance(base, nn.Module) and not base.training
    shapes = {key: (value.shape, value.dtype) for key, value in base.state_dict().items()}
    assert {value.dtype for value in base.parameters()} == {torch.float32}
    for entry, hyperparameters in suite.hyperparameters.items():
        if entry == LABELLED:
            continue
        get_method(entry.rpartition("+")[2].partition("/")[0]).check(hyperparameters)
    for task in tasks_of(name):
        expert = suite.load_expert(task)
        assert {key: (value.shape, value.dtype) for key, value in expert.items()} == shapes
        assert all(value.isfinite().all() for value in expert.values())
        assert any(not torch.equal(value, expert[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experts_are_better_than_the_base(name):
    suite = get_suite(name)
    facts = suite.provenance["tasks"]
    gains = [fact["accuracy"]["test"]["expert"] - fact["accuracy"]["test"]["base"] for fact in facts.values()]
    assert min(gains) > 0 and sum(gains) / len(gains) >= MARGINS[name]
    for task, fact in facts.items():
        assert suite.expert_path(task).stat().st_size == fact["bytes"]
        assert abs(fact["accuracy"]["test"]["expert"] - fact["test accuracy before quantisation"]) < 0.05


def test_all_assets_together_are_small():
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= 60 * 2**20


def test_vision8_encodes_like_imagenet():
    generator = np.random.default_rng(0)
    colour = generator.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    expected = (torch.from_numpy(colour).double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(encode(colour).double(), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    grey = np.full((2, 28, 28), 51, np.uint8)
    expected = ((0.2 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    torch.testing.assert_close(encode(grey), expected, atol=1e-5, rtol=0)


def test_vision8_augments_by_moving_a_few_pixels():
    batch = torch.arange(64.0 * 64).view(1, 1, 64, 64)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        row, column = divmod(int((shift(batch, generator) == 0).nonzero()[0, 2:] @ torch.tensor([64, 1])), 64)
        seen.add(((row + 32) % 64 - 32, (column + 32) % 64 - 32))
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(-4, 5))


def test_text8_cuts_and_pads():
    batch = get_suite("text8").definition.encode(np.array(["short", "word " * 100]))
    assert set(batch) == {"input_ids", "attention_mask"} and batch["input_ids"].shape == (2, 48)
    assert batch["attention_mask"].sum(1).tolist() == [3, 48]


def test_text8_features_do_not_depend_on_padding():
    definition = get_suite("text8").definition
    base = definition.load_base()
    sentences = np.array(["A short one.", "A much longer sentence, so that the short one has to be padded."])
    with torch.no_grad():
        together = definition.forward(base, definition.encode(sentences))
        alone = definition.encode(sentences[:1])
        hidden = base(**alone).last_hidden_state
    assert together.shape == (2, 384)
    torch.testing.assert_close(together[0], hidden[0].mean(0), atol=1e-5, rtol=1e-4)
