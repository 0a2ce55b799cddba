"""Merges in execution order block by block: what a merge in memory gives, from what is written of blocks before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from statsmerge_ext import blockwise, run_merge
from statsmerge_ext.calibration import read_samples
from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.checkpoints.skeleton import build_skeleton
from statsmerge_ext.engine import carried, layer_by_layer, sequential
from statsmerge_ext.engine.block_order import rehearse_flows
from statsmerge_ext.engine.blocks import BlockModel
from statsmerge_ext.engine.dataflow import trace_dataflow
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.errors import CheckpointError
from tests.test_blockwise import BATCH, assert_same, in_memory, interrupted_after, loaded, merge
from tests.test_processes import scenario
from tests.tiny_models import write_recipe
from tests.tiny_transformers import FAMILIES, samples_of, save_deep, save_family


@pytest.fixture(autouse=True)
def passes_as_they_are(monkeypatch):
    """In memory batches are run together, and passes side by side with fewer threads each, which change the rounding of
    sums (those of a mixture's experts depend on torch's threads); here they are the same."""
    monkeypatch.setattr(sequential, "_SAMPLES_TOGETHER", 1)
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("family", "padding", "method"),
    [
        ("llama", "left", "drift_compensation"),
        ("gpt2", "right", "drift_compensation"),
        ("bert", "right", "drift_compensation"),
        ("gemma2", "left", "drift_compensation"),
        ("qwen2", "left", "featcal"),
        ("qwen3 mixture", "right", "regmean_plus_plus"),
        ("vit", "", "featcal"),
    ],
)
def test_the_same_bits_as_in_memory(tmp_path, family, padding, method):
    """With tied embeddings, (1 + weight) norms, and experts of a mixture."""
    models = save_family(tmp_path, family, padding=padding)
    report, result = merge(models, method), in_memory(models, method)
    assert_same(loaded(models / "out"), result.state)
    assert "in_memory" not in report
    result.report.pop("seconds")
    assert {key: report[key] for key in result.report} == result.report
    base = loaded(models / "base")
    assert all(not torch.equal(result.state[name], base[name]) for name in base)


def test_layers_before_the_first_change_are_the_bases_own(tmp_path):
    """Also where a later block is the first that is changed; and rows of long tables are a few at a time."""
    models = save_family(tmp_path, "llama")
    base = dict(open_checkpoint(models / "base"))
    for name in ("a", "b"):
        state = dict(open_checkpoint(models / name))
        same = {key for key in state if "layers.1" not in key and "layers.2" not in key}
        for file in (models / name).glob("*.safetensors*"):
            file.unlink()
        save_file({key: base[key] if key in same else state[key] for key in state}, models / name / "model.safetensors")
    merge(models, "drift_compensation")
    merged, expected = loaded(models / "out"), in_memory(models, "drift_compensation").state
    assert_same(merged, expected)
    unchanged = [name for name in base if torch.equal(merged[name], base[name])]
    assert "model.layers.0.mlp.down_proj.weight" in unchanged and "lm_head.weight" not in unchanged


def test_wide_layers_and_long_tables_in_parts(tmp_path, monkeypatch):
    models = save_family(tmp_path, "bert")
    ridges = {"ridge": 0.1, "drift_ridge": 1.0}  # rounding is hardly amplified
    whole = in_memory(models, "drift_compensation", **ridges).state
    monkeypatch.setattr(layer_by_layer, "_AVERAGED", 40)
    monkeypatch.setattr(layer_by_layer, "_SOLVED", 5 * 16)
    merge(models, "drift_compensation", parameters=ridges)
    for name, merged in loaded(models / "out").items():
        assert (merged - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen3 mixture", "mixtral"}))
def test_what_surrounds_layers_is_found_without_weights(tmp_path, family):
    models = save_family(tmp_path, family)
    skeleton = build_skeleton(open_checkpoint(models / "base"))
    model = FAMILIES[family]().eval()
    batch = samples_of(model, "right", 1, seed=0)
    blocks = BlockModel(skeleton, "cpu", default_forward)
    expected = trace_dataflow(model, blocks.layers, default_forward, batch)
    if family == "albert":
        with pytest.raises(CheckpointError, match="attention.query.weight' is called several times"):
            rehearse_flows(blocks, batch, blocks.layers)
    else:
        assert rehearse_flows(blocks, batch, blocks.layers)[1] == expected


def test_a_residual_connection_past_a_block():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.blocks[2](x + self.blocks[1](self.blocks[0](x)))

    with torch.device("meta"):
        model = Model()
    model = BlockModel(model, "cpu", default_forward)
    with pytest.raises(CheckpointError, match="layer 'blocks.1.weight': what is added .* is beyond its block"):
        rehearse_flows(model, torch.zeros(2, 4), model.layers)
    others = [layer for layer in model.layers if "blocks.1" not in layer.name]
    calls, flows = rehearse_flows(model, torch.zeros(2, 4), others)  # which layers of other methods do not matter for
    assert len(calls) == 3 and not any(flow.skip for flow in flows.values())


def test_a_model_that_cannot_be_taken_in_blocks_is_merged_in_memory(tmp_path):
    models = save_family(tmp_path, "albert")
    report = merge(models, "drift_compensation")
    assert "is called several times in a forward pass" in report["in_memory"]
    assert_same(loaded(models / "out"), in_memory(models, "drift_compensation").state)


def test_hidden_states_beyond_the_budget_go_to_files(tmp_path, monkeypatch):
    """Between blocks and between layers, all that a pass holds."""
    models = save_family(tmp_path, "gpt2", padding="left")
    monkeypatch.setattr(carried, "_SMALLEST", 1000)
    written = []
    write = carried.CarriedStates._write
    monkeypatch.setattr(
        carried.CarriedStates,
        "_write",
        lambda self, key, tensors: (written.append(sum(x.nbytes for x in tensors)), write(self, key, tensors))[1],
    )
    merge(models, "drift_compensation", memory_budget="20KB")
    assert_same(loaded(models / "out"), in_memory(models, "drift_compensation").state)
    assert len(written) > 100 and min(written) > 0


# Interruptions


@pytest.mark.parametrize(("family", "blocks"), [("qwen2", 1), ("qwen3 mixture", 3), ("llama", 6)])
def test_an_interrupted_merge_goes_on_at_its_block(tmp_path, monkeypatch, family, blocks):
    """In bfloat16, where what is written is not what was computed; with tied embeddings, which the head reads again."""
    models = save_family(tmp_path, family, dtype=torch.bfloat16)
    undisturbed = merge(models, "drift_compensation", out="undisturbed", out_shard_size="10KB")
    with monkeypatch.context() as patch:
        interrupted_after(patch, blocks)
        with pytest.raises(KeyboardInterrupt):
            merge(models, "drift_compensation", out_shard_size="10KB")
    solved = []
    solve = blockwise.BlockMerge._merge_block
    monkeypatch.setattr(blockwise.BlockMerge, "_merge_block", lambda *a: (solved.append(a[1].path), solve(*a)) and None)
    report = merge(models, "drift_compensation", out_shard_size="10KB")
    assert len(solved) == (6 if family == "qwen2" else 7) - blocks
    for key in report.keys() - {"seconds"}:
        assert report[key] == undisturbed[key]
    for file in (models / "undisturbed").glob("*.safetensors"):
        assert (models / "out" / file.name).read_bytes() == file.read_bytes()


def test_killed_at_random_moments_the_same_command_ends_in_the_same_files(tmp_path):
    models = save_family(tmp_path, "llama", dtype=torch.bfloat16)
    data = {name: f"{name}.safetensors" for name in ("a", "b")}
    recipe = write_recipe(models, "drift_compensation", calibration={"data": data, "batch_size": BATCH})
    command = [sys.executable, "-m", "tests.kill_merges", str(recipe), str(tmp_path), "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["differing"] == []
    assert facts["killed"] >= 8 and facts["resumed"] >= 2


def assert_passes_see_what_is_written(directory, monkeypatch, **recipe):
    """The merged model's own inputs, seen while it is merged, are those of the model on disk."""
    models = save_family(directory, "llama", dtype=torch.bfloat16)
    seen = []
    features = layer_by_layer._features

    def noted(call, *rest):
        if call.now.layers[0].name == "lm_head.weight":
            seen.append(call.now.input.clone())
        return features(call, *rest)

    monkeypatch.setattr(layer_by_layer, "_features", noted)
    merge(models, "drift_compensation", **recipe)
    model = FAMILIES["llama"]().eval()
    model.load_state_dict(loaded(models / "out"))
    batch = read_samples(models / "a.safetensors", batch_size=BATCH)[0]
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state
    torch.testing.assert_close(seen[0], hidden)


def test_what_passes_see_is_what_is_written(tmp_path, monkeypatch):
    assert_passes_see_what_is_written(tmp_path, monkeypatch)


def test_two_processes_share_samples(tmp_path):
    """Block by block and in memory: one has two batches of expert "a", the other two and one of "b"."""
    models = save_family(tmp_path, "llama", samples=80)
    cut = load_file(models / "b.safetensors")
    save_file({key: x[:20].clone() for key, x in cut.items()}, models / "b.safetensors")
    facts = scenario("samples_in_order", models)
    assert facts.keys() == {"drift_compensation-blocks", "drift_compensation-memory.pt"}
    for statuses, apart in facts.values():
        assert statuses == [0, 0] and apart < 1e-5, facts


# What it takes


PEAK = """
import resource, sys
from statsmerge_ext import run_merge
from statsmerge_ext.memory import keep_freed_memory

keep_freed_memory(2**23)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_merge(sys.argv[1], sys.argv[2], progress=False)  # of a tiny model: what is loaded for any merge is there
before = peak()
run_merge(sys.argv[3], sys.argv[4], progress=False)
more = peak() - before
plan = run_merge(sys.argv[3], sys.argv[4] + "-again", progress=False, dry_run=True)["plan"]
print(1024 * more, plan["memory"], 1024 * peak())
"""


def test_memory_is_that_of_one_block_whatever_the_depth(tmp_path):
    """A model of 53 MB and two experts, in 40 MB."""
    save_family(tmp_path / "tiny", "llama")
    deep = save_deep(tmp_path / "deep", 20, ["a", "b"])
    save_file(load_file(tmp_path / "tiny" / "a.safetensors"), deep / "samples.safetensors")
    data = {"data": {name: "a.safetensors" for name in ("a", "b")}}
    arguments = [write_recipe(tmp_path / "tiny", "drift_compensation", calibration=data), tmp_path / "tiny" / "out"]
    arguments += [write_recipe(deep, "drift_compensation", calibration={"data": "samples.safetensors"}), deep / "out"]
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    more, planned, peak = map(int, done.stdout.split())
    assert (deep / "out" / "model.safetensors").stat().st_size > 50e6
    assert more < 40e6
    assert planned == pytest.approx(peak, rel=0.25)


def test_a_dry_run_merges_one_block_of_each_kind(tmp_path, monkeypatch):
    models = save_family(tmp_path, "llama")
    solved = []
    solve = blockwise.BlockMerge._merge_block
    monkeypatch.setattr(blockwise.BlockMerge, "_merge_block", lambda *a: (solved.append(a[1].path), solve(*a)) and None)
    before = sorted(models.rglob("*"))
    plan = merge(models, "drift_compensation", dry_run=True)["plan"]
    assert sorted(models.rglob("*")) == sorted([*before, models / "recipe.yaml"])
    assert solved == ["", "model.embed_tokens", "model.layers.0", "model.norm", "lm_head"]
    recipe = models / "recipe.yaml"
    report = run_merge(recipe, models / "out", progress=False)
    states = [open_checkpoint(models / name) for name in ("base", "a", "b")]
    assert plan["bytes_read"] == sum(tensor.nbytes for state in states for tensor in state.values())
    assert {key: plan[key] for key in report["plan"]} == report["plan"]
