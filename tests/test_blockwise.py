"""Merges block by block: what a merge in memory gives, in the memory of one block, and after any interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import statsmerge_ext
from statsmerge_ext import LayerRule, blockwise, output, run_merge
from statsmerge_ext.calibration import read_samples
from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.checkpoints.architecture import build_model
from statsmerge_ext.checkpoints.skeleton import build_skeleton
from statsmerge_ext.engine import block_evidence, carried
from statsmerge_ext.engine.blocks import BlockModel
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.errors import CalibrationError, CheckpointError, MethodError
from tests.tiny_models import files_in, write_recipe
from tests.tiny_transformers import FAMILIES, save_deep, save_family

BATCH = 4


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def merge(
    models: Path,
    method: str = "lot",
    out: str = "out",
    parameters: dict | None = None,
    progress=False,
    layers=None,
    **options,
) -> dict:
    data = {"data": {name: f"{name}.safetensors" for name in ("a", "b")}, "batch_size": BATCH}
    recipe = write_recipe(models, method, calibration=data, parameters=parameters or {}, layers=layers)
    return run_merge(recipe, models / out, progress=progress, **options)


def in_memory(models: Path, method: str = "lot", **parameters) -> statsmerge_ext.engine.merging.MergeResult:
    base, *experts = (build_model(open_checkpoint(models / name)) for name in ("base", "a", "b"))
    calibration = {name: read_samples(models / f"{name}.safetensors", batch_size=BATCH) for name in ("a", "b")}
    experts = dict(zip("ab", experts, strict=True))
    return statsmerge_ext.merge(method, base=base, experts=experts, calibration=calibration, **parameters)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return build_model(open_checkpoint(path)).state_dict()


def assert_same(merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert merged.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"albert"}))
def test_the_same_bits_as_in_memory(tmp_path, family, padding):
    """Every family, with grouped queries, tied embeddings, sliding windows, rotary positions where it has them."""
    models = save_family(tmp_path, family, padding=padding)
    report = merge(models)
    result = in_memory(models)
    assert_same(loaded(models / "out"), result.state)
    assert "in_memory" not in report
    assert not (models / "out.partial").exists()
    result.report.pop("seconds")
    assert {key: report[key] for key in result.report} == result.report
    assert json.loads((models / "out" / "merge_report.json").read_text()) == report
    base = loaded(models / "base")
    assert all(not torch.equal(result.state[name], base[name]) for name in base)


def test_a_block_that_is_called_several_times(tmp_path):
    """ALBERT's only block: its Gram matrices are summed call by call, and differ by the rounding of these sums."""
    models = save_family(tmp_path, "albert")
    assert "in_memory" not in merge(models, "regmean")
    merged, expected, base = loaded(models / "out"), in_memory(models, "regmean").state, loaded(models / "base")
    for name in expected:
        apart, moved = (merged[name] - expected[name]).norm(), (expected[name] - base[name]).norm()
        assert apart <= 1e-5 * moved, name


def test_regmean(tmp_path):
    models = save_family(tmp_path, "llama")
    merge(models, "regmean", parameters={"reduce_non_diagonal_ratio": 0.8})
    assert_same(loaded(models / "out"), in_memory(models, "regmean", reduce_non_diagonal_ratio=0.8).state)


RULES = [
    {"filter": "lm_head", "merge_method": "task_arithmetic", "parameters": {"weights": [0.2, 0.5]}},
    {"filter": "norm", "merge_method": "keep"},
    {"filter": "layers.2.", "parameters": {"scaling_factor": 0.5}},
    {"filter": "layers.1.self_attn", "merge_method": "regmean"},
    {"filter": "up_proj", "merge_method": "linear"},
    {"filter": "down_proj", "merge_method": "tsv_m"},
]


def test_layers_that_go_by_methods_of_their_own(tmp_path, monkeypatch):
    """The output projection is tied to the embedding, and what reads one input goes different ways."""
    models = save_family(tmp_path, "qwen2")
    monkeypatch.setattr(block_evidence, "_ELEMENTS", 40)
    assert merge(models, layers=RULES, dry_run=True)["plan"].keys() >= {"seconds", "memory"}
    report = merge(models, layers=RULES)
    rules = [LayerRule(r["filter"], r.get("merge_method"), r.get("parameters", {})) for r in RULES]
    rules[0] = LayerRule("lm_head", "task_arithmetic", {"weights": [0.2, 0.5], "scaling_factor": 1.0})
    result = in_memory(models, layers=rules)
    assert_same(loaded(models / "out"), result.state)
    assert "in_memory" not in report and not (models / "out" / "coefficients.json").exists()
    result.report.pop("seconds")
    assert {key: report[key] for key in result.report} == result.report
    assert report["rules"][0]["layers"] == ["model.embed_tokens.weight"]
    assert report["layers"]["never_called"] == []
    for dry_run in (False, True):
        with pytest.raises(MethodError, match="filter 'layers.3' is in no parameter's name"):
            merge(models, out="other", layers=[{"filter": "layers.3", "merge_method": "keep"}], dry_run=dry_run)


def test_half_precision_shards_and_dtypes(tmp_path):
    """The merge computes in float32 and rounds once, whatever the files hold."""
    models = save_family(tmp_path, "qwen2", dtype=torch.bfloat16)
    merge(models, out_shard_size="10KB")
    written = open_checkpoint(models / "out")
    assert len(list((models / "out").glob("*.safetensors"))) > 1
    assert {written.dtype(name) for name in written} == {torch.bfloat16}
    expected = {name: tensor.bfloat16().float() for name, tensor in in_memory(models).state.items()}
    assert_same(loaded(models / "out"), expected)
    with pytest.raises(CheckpointError, match="exists already"):
        merge(models)


def test_long_tables_are_merged_a_few_rows_at_a_time(tmp_path, monkeypatch):
    models = save_family(tmp_path, "bert")
    monkeypatch.setattr(block_evidence, "_ELEMENTS", 40)
    merge(models)
    assert_same(loaded(models / "out"), in_memory(models).state)


@pytest.mark.parametrize("family", ["gemma2", "vit"])
def test_hidden_states_beyond_the_budget_go_to_files(tmp_path, monkeypatch, family):
    models = save_family(tmp_path, family, padding="left")
    monkeypatch.setattr(carried, "_SMALLEST", 1)
    written = []
    write = carried.CarriedStates._write

    def counted(self, key, tensors):
        states = write(self, key, tensors)
        written.append(sum(size for _, size in states))
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor, _ in states)
        return states

    monkeypatch.setattr(carried.CarriedStates, "_write", counted)
    merge(models, memory_budget="6KB")
    assert_same(loaded(models / "out"), in_memory(models).state)
    assert len(written) > 8 and min(written) > 0


def test_blocks_are_found_in_the_module_tree(tmp_path):
    def paths(family: str) -> list[str]:
        save_family(tmp_path / family, family)
        model = BlockModel(build_skeleton(open_checkpoint(tmp_path / family / "base")), "cpu", default_forward)
        samples = load_file(tmp_path / family / "a.safetensors")
        return [block.path for block in model.rehearse(samples)], [layer.name for layer in model.resident.layers]

    layers = [f"model.layers.{place}" for place in range(3)]
    assert paths("qwen3 mixture") == (["model.embed_tokens", *layers, "model.norm", "lm_head"], [])
    layers = [f"roberta.encoder.layer.{place}" for place in range(3)]
    assert paths("roberta") == (["roberta.embeddings", *layers, "classifier"], [])
    layers = [f"vision_model.encoder.layers.{place}" for place in range(3)]
    beside = ["vision_model.embeddings", "vision_model.pre_layrnorm"]
    found, resident = paths("clip vision")
    assert found == [*beside, *layers, "vision_model.post_layernorm", "visual_projection"] and resident == []
    assert paths("albert")[0].count("encoder.albert_layer_groups.0") == 3


def test_a_model_that_cannot_be_taken_in_blocks_is_merged_in_memory(tmp_path, monkeypatch, capsys):
    """One that uses the weights of a block outside of its call: the rehearsal fails, and nothing is lost but memory."""
    models = save_family(tmp_path, "gpt2")
    forward = transformers.GPT2Model.forward

    def peeking(self, *arguments, **options):
        if not self.h[1].mlp.c_fc.weight.numel():
            raise RuntimeError("the second block has no weights")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(transformers.GPT2Model, "forward", peeking)
    report = merge(models, progress=True)
    assert report["in_memory"] == "RuntimeError: the second block has no weights"
    assert "merging in memory: RuntimeError: the second block has no weights" in capsys.readouterr().err
    assert_same(loaded(models / "out"), in_memory(models).state)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_tied_parameters_in_memory(tmp_path, family):
    """A pickle cannot be written block by block. Of a tied parameter, a bias too, experts' files hold one name."""
    models = save_family(tmp_path, family)
    merge(models, out="out.pt")
    merge(models, out="blocks")
    merged, expected = open_checkpoint(models / "out.pt"), open_checkpoint(models / "blocks")
    assert_same({name: merged[name] for name in expected}, dict(expected))


PEAK = """
import resource, sys
from statsmerge_ext import run_merge
from statsmerge_ext.memory import keep_freed_memory

keep_freed_memory(2**20)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_merge(sys.argv[1], sys.argv[2], progress=False)  # of a tiny model: what is loaded for any merge is there
before = peak()
plan = run_merge(sys.argv[3], sys.argv[4], progress=False, dry_run=True)["plan"]
run_merge(sys.argv[3], sys.argv[4], progress=False)
print(1024 * (peak() - before), plan["memory"], 1024 * peak())
"""


def test_memory_is_that_of_one_block_whatever_the_depth_and_the_number_of_experts(tmp_path):
    """A model of 65 MB and five experts, in 30 MB."""
    save_family(tmp_path / "tiny", "llama")
    experts = ["a", *"bcde"]
    deep = save_deep(tmp_path / "deep", 24, experts)
    save_file(load_file(tmp_path / "tiny" / "a.safetensors"), deep / "samples.safetensors")
    data = {"data": {name: "a.safetensors" for name in ("a", "b")}}
    arguments = [write_recipe(tmp_path / "tiny", "lot", calibration=data), tmp_path / "tiny" / "out"]
    data = {"data": "samples.safetensors"}
    arguments += [write_recipe(deep, "lot", experts, calibration=data), deep / "out"]
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    more, planned, peak = map(int, done.stdout.split())
    assert (deep / "out" / "model.safetensors").stat().st_size > 60e6
    assert more < 30e6
    assert planned == pytest.approx(peak, rel=0.25)


def test_a_dry_run_says_what_the_merge_will_take(tmp_path):
    models = save_family(tmp_path, "llama")
    before = files_in(models)
    plan = merge(models, dry_run=True)["plan"]
    assert files_in(models) == sorted([*before, "recipe.yaml"])
    began = time.perf_counter()
    report = merge(models)
    seconds = time.perf_counter() - began
    states = [open_checkpoint(models / name) for name in ("base", "a", "b")]
    assert plan["bytes_read"] == sum(tensor.nbytes for state in states for tensor in state.values())
    assert {key: plan[key] for key in report["plan"]} == report["plan"]
    # Of so small a model most of the time is files' and hooks'; what is disturbed is disturbed in one of the two runs.
    assert seconds / 10 < plan["seconds"] < 5 * seconds


def test_a_dry_run_merges_one_block_of_each_kind(tmp_path, monkeypatch):
    """Embeddings and head have the same shape and are no less two kinds; blocks of a known kind are not computed."""
    models = save_family(tmp_path, "llama")
    written, calls = [], []
    write, forward = blockwise.BlockMerge._merge_block, transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        blockwise.BlockMerge, "_merge_block", lambda *a: (written.append(a[1].path), write(*a)) and None
    )
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP, "forward", lambda *a: (calls.append(1), forward(*a))[1]
    )
    merge(models, dry_run=True)
    assert written == ["model.embed_tokens", "model.layers.0", "model.norm", "lm_head", ""]
    assert len(calls) == 3 + 2  # the rehearsal's three blocks, and one for each of two experts


# Interruptions


def interrupted_after(monkeypatch, blocks: int) -> None:
    save, left = output._Saver.save_if_due, [blocks]

    def save_and_stop(self, state):
        save(self, state)
        self._running.result()
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(output, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(output._Saver, "save_if_due", save_and_stop)


@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_an_interrupted_merge_goes_on_at_its_block(tmp_path, monkeypatch, blocks):
    models = save_family(tmp_path, "qwen3 mixture")
    undisturbed = merge(models, out="undisturbed")
    with monkeypatch.context() as patch:
        interrupted_after(patch, blocks)
        with pytest.raises(KeyboardInterrupt):
            merge(models)
    assert not (models / "out").exists()
    written = []
    write = blockwise.BlockMerge._merge_block
    monkeypatch.setattr(
        blockwise.BlockMerge, "_merge_block", lambda *a: (written.append(a[1].path), write(*a)) and None
    )
    report = merge(models)
    assert len(written) == 7 - blocks  # embeddings, three blocks, norm, head, and what belongs to none
    for key in report.keys() - {"seconds"}:
        assert report[key] == undisturbed[key]
    for file in (models / "undisturbed").glob("*.safetensors"):
        assert (models / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_another_merge_has_left_is_not_gone_on_with(tmp_path, monkeypatch):
    models = save_family(tmp_path, "gpt2")
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            merge(models)
    samples = load_file(models / "a.safetensors")
    samples["input_ids"][0, 0] = 7
    save_file(samples, models / "a.safetensors")
    with pytest.raises(CheckpointError, match="is the journal of another run"):
        merge(models)
    merge(models, resume=False)
    assert not (models / "out.partial").exists()


def test_killed_at_random_moments_the_same_command_ends_in_the_same_files(tmp_path):
    models = save_family(tmp_path, "llama")
    data = {name: f"{name}.safetensors" for name in ("a", "b")}
    recipe = write_recipe(models, "lot", calibration={"data": data, "batch_size": BATCH})
    command = [sys.executable, "-m", "tests.kill_merges", str(recipe), str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["differing"] == []
    assert facts["killed"] >= 50 and facts["resumed"] >= 20


# Bad input


def assert_refused(models: Path, error: type[Exception], message: str) -> None:
    before = files_in(models)
    with pytest.raises(error, match=message):
        merge(models)
    assert files_in(models) == sorted({*before, "recipe.yaml"})


def test_weights_that_are_not_finite(tmp_path):
    models = save_family(tmp_path, "llama")
    state = dict(open_checkpoint(models / "a"))
    state["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(state, models / "a" / "model.safetensors")
    assert_refused(models, CheckpointError, r"a.*tensor 'model.layers.1.input_layernorm.weight' holds 1 NaN")


def test_another_vocabulary(tmp_path):
    models = save_family(tmp_path, "llama")
    state = dict(open_checkpoint(models / "a"))
    state["model.embed_tokens.weight"] = torch.randn(60, 16)
    save_file(state, models / "a" / "model.safetensors")
    assert_refused(models, CheckpointError, "another vocabulary size: .* has 60 rows, the base's has 50")


def test_samples_that_the_model_does_not_take(tmp_path):
    models = save_family(tmp_path, "llama")
    save_file({"pixel_values": torch.randn(3, 3, 16, 16)}, models / "a.safetensors")
    assert_refused(models, CalibrationError, "the model cannot be run on the samples: ")
