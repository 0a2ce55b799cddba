"""Rules for layers beside a method in execution order, block by block: what a merge in memory gives."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from statsmerge_ext import LayerRule, blockwise
from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.errors import CheckpointError, RecipeError
from tests.test_blockwise import assert_same, in_memory, interrupted_after, loaded, merge
from tests.test_blockwise_in_order import assert_passes_see_what_is_written, passes_as_they_are  # noqa: F401
from tests.test_processes import scenario
from tests.tiny_models import files_in
from tests.tiny_transformers import save_family

# Whole blocks (the first, the last), and parts of all blocks.
TEXT = [
    {"filter": "embed_tokens", "merge_method": "linear"},
    {"filter": "layers.0.", "merge_method": "keep"},
    {"filter": "layers.1.input_layernorm", "merge_method": "keep"},
    {"filter": "down_proj", "merge_method": "tsv_m"},
    {"filter": "v_proj.bias", "merge_method": "linear"},
    {"filter": "model.norm", "merge_method": "keep"},
]
IMAGES = [
    {"filter": "embeddings", "merge_method": "keep"},
    {"filter": "layers.1.", "merge_method": "wudi"},
    {"filter": "q_proj.weight", "merge_method": "linear"},
    {"filter": "classifier.bias", "merge_method": "keep"},
]
ROUTER = [
    {"filter": "mlp.gate.weight", "merge_method": "keep"},
    {"filter": "layers.1.mlp.experts", "merge_method": "iso_c"},
]


def as_rules(layers):
    return [LayerRule(rule["filter"], rule["merge_method"]) for rule in layers]


@pytest.mark.parametrize(
    ("family", "method", "layers"),
    [
        ("qwen2", "drift_compensation", TEXT),
        ("qwen2", "featcal", [{"filter": "lm_head", "merge_method": "linear"}]),
        ("qwen3 mixture", "regmean_plus_plus", ROUTER),
        ("vit", "drift_compensation", IMAGES),
    ],
)
def test_the_same_bits_as_in_memory(tmp_path, family, method, layers):
    """Also where a whole block is others', where the output projection is tied to their embedding, and in a mixture."""
    models = save_family(tmp_path, family, padding="left")
    report = merge(models, method, layers=layers)
    result = in_memory(models, method, layers=as_rules(layers))
    assert_same(loaded(models / "out"), result.state)
    assert "in_memory" not in report and not (models / "out" / "coefficients.json").exists()
    result.report.pop("seconds")
    assert {key: report[key] for key in result.report} == result.report
    assert json.loads((models / "out" / "merge_report.json").read_text()) == report
    assert report["never_called"] == [] and "never_called" not in report["layers"]


def test_an_interrupted_merge_goes_on_at_its_block(tmp_path, monkeypatch):
    """In bfloat16, behind a block whose layers are all others'; what passes see of these is what is written, too."""
    models = save_family(tmp_path, "qwen2", dtype=torch.bfloat16)
    undisturbed = merge(models, "drift_compensation", layers=TEXT, out="undisturbed")
    for blocks in (3, 5):
        with monkeypatch.context() as patch:
            interrupted_after(patch, blocks)
            with pytest.raises(KeyboardInterrupt):
                merge(models, "drift_compensation", layers=TEXT)
        solved = []
        solve = blockwise.BlockMerge._merge_block
        with monkeypatch.context() as patch:
            patch.setattr(
                blockwise.BlockMerge, "_merge_block", lambda *a: (solved.append(a[1].path), solve(*a)) and None
            )
            report = merge(models, "drift_compensation", layers=TEXT)
        assert len(solved) == 6 - blocks
        for key in report.keys() - {"seconds"}:
            assert report[key] == undisturbed[key]
        for file in (models / "undisturbed").glob("*.safetensors"):
            assert (models / "out" / file.name).read_bytes() == file.read_bytes()
        shutil.rmtree(models / "out")


def test_what_passes_see_of_other_methods_is_what_is_written(tmp_path, monkeypatch):
    layers = [{"filter": "down_proj", "merge_method": "linear"}]
    assert_passes_see_what_is_written(tmp_path, monkeypatch, layers=layers)


@pytest.mark.parametrize("kept", ["layers.0.", "layers.1.", "embed_tokens"])
def test_layers_before_the_first_change_are_the_bases_own(tmp_path, monkeypatch, kept):
    """Also where that is a layer that is kept; and in a run that goes on behind it."""
    models = save_family(tmp_path, "llama")
    base = dict(open_checkpoint(models / "base"))
    for name in ("a", "b"):
        state = dict(open_checkpoint(models / name))
        for file in (models / name).glob("*.safetensors*"):
            file.unlink()
        moved = {key: state[key] if "layers.1" in key else base[key] for key in state}
        save_file(moved, models / name / "model.safetensors")
    layers = [{"filter": kept, "merge_method": "keep"}]
    report = merge(models, "drift_compensation", layers=layers)
    merged = loaded(models / "out")
    assert_same(merged, in_memory(models, "drift_compensation", layers=as_rules(layers)).state)
    assert "in_memory" not in report
    same = {key for key in base if torch.equal(merged[key], base[key])}
    first = {key for key in base if "layers.0" in key or "embed_tokens" in key}
    assert same == first | {key for key in base if kept in key}
    with monkeypatch.context() as patch:
        interrupted_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            merge(models, "drift_compensation", layers=layers, out="resumed")
    merge(models, "drift_compensation", layers=layers, out="resumed")
    assert_same(loaded(models / "resumed"), merged)


def test_a_dry_run_merges_one_block_of_each_kind(tmp_path, monkeypatch):
    """A block whose layers go by other methods is of another kind."""
    models = save_family(tmp_path, "llama")
    solved = []
    solve = blockwise.BlockMerge._merge_block
    monkeypatch.setattr(blockwise.BlockMerge, "_merge_block", lambda *a: (solved.append(a[1].path), solve(*a)) and None)
    layers = [{"filter": "layers.0.", "merge_method": "keep"}]
    plan = merge(models, "drift_compensation", layers=layers, dry_run=True)["plan"]
    assert plan.keys() >= {"seconds", "memory", "bytes_read"}
    assert solved == ["", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]


def test_two_processes_share_samples(tmp_path):
    models = save_family(tmp_path, "llama", samples=80)
    facts = scenario("rules_in_order", models)
    assert facts.keys() == {"drift_compensation-blocks", "drift_compensation-memory.pt"}
    for statuses, apart in facts.values():
        assert statuses == [0, 0] and apart < 1e-5, facts


def test_what_goes_by_other_routes_is_merged_in_memory(tmp_path):
    """Methods that look at all of their layers at once, or at Gram matrices; and a model that calls layers again."""
    models = save_family(tmp_path / "qwen2", "qwen2")
    for method, parameters in (("ties", {"density": 0.5}), ("regmean", {"reduce_non_diagonal_ratio": 0.5})):
        layers = [{"filter": "down_proj", "merge_method": method, "parameters": parameters}]
        merge(models, "drift_compensation", out=method, layers=layers)
        rules = [LayerRule("down_proj", method, parameters)]
        assert_same(loaded(models / method), in_memory(models, "drift_compensation", layers=rules).state)
    models = save_family(tmp_path / "albert", "albert")
    layers = [{"filter": "embedding", "merge_method": "keep"}]
    assert "called several times" in merge(models, "drift_compensation", layers=layers)["in_memory"]
    expected = in_memory(models, "drift_compensation", layers=as_rules(layers)).state
    assert_same(loaded(models / "out"), expected)


def test_what_cannot_be_leaves_nothing_behind(tmp_path):
    models = save_family(tmp_path, "llama")
    state = dict(open_checkpoint(models / "b"))
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    for file in (models / "b").glob("*.safetensors*"):
        file.unlink()
    save_file(state, models / "b" / "model.safetensors")
    before = files_in(models)
    layers = [{"filter": "layers.1.", "merge_method": "keep"}]
    with pytest.raises(CheckpointError, match="up_proj.weight' holds 0 NaN and 1 infinite"):
        merge(models, "drift_compensation", layers=layers)
    with pytest.raises(RecipeError, match="'featcal' and 'drift_compensation' both run the model"):
        merge(models, "drift_compensation", layers=[{"filter": "norm", "merge_method": "featcal"}])
    assert sorted({*files_in(models)} - {"recipe.yaml"}) == before
