"""Bad input on the command line: one line that names file and tensor, status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from statsmerge_ext import output
from statsmerge_ext.checkpoints import open_checkpoint, writing
from tests.tiny_models import (
    assert_refused,
    files_in,
    merge,
    save_tiny_bert,
    save_tiny_family,
    tiny_bert,
    write_recipe,
)


@pytest.fixture
def models(tmp_path):
    return save_tiny_family(tmp_path)


def rewrite(directory: Path, change) -> None:
    state = dict(open_checkpoint(directory))
    change(state)
    save_file(state, directory / "model.safetensors")


def test_missing_tensors(models, capsys):
    rewrite(models / "a", lambda state: state.pop("pooler.dense.bias"))
    assert_refused(models, capsys, str(models / "a"), "lacks tensor 'pooler.dense.bias'")


def test_other_shapes(models, capsys):
    rewrite(models / "a", lambda state: state.update({"pooler.dense.bias": torch.ones(3)}))
    assert_refused(models, capsys, "a/model.safetensors", "tensor 'pooler.dense.bias' has shape [3], expected [16]")


def test_other_vocabulary(models, capsys):
    save_tiny_bert(models / "a", model=tiny_bert(vocabulary=41))
    assert_refused(
        models,
        capsys,
        "a/model.safetensors",
        "another vocabulary size: tensor 'embeddings.word_embeddings.weight' has 41",
    )


@pytest.mark.parametrize("whose", ["base", "a"])
@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "lot", "calibration": {"data": "texts.txt"}}])
def test_nan_weights(models, capsys, whose, recipe):
    rewrite(models / whose, lambda state: state["pooler.dense.bias"].fill_(float("nan")))
    assert_refused(models, capsys, whose, "tensor 'pooler.dense.bias' holds", **recipe)


def test_results_that_overflow_the_output_dtype(models, capsys):
    rewrite(models / "a", lambda state: state["pooler.dense.bias"].fill_(1e6))
    assert_refused(
        models, capsys, "the merged model: tensor 'pooler.dense.bias' holds 0 NaN and 16 infinite", out_dtype="float16"
    )


def test_another_architecture(models, capsys):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40)).save_pretrained(models / "a")
    assert_refused(models, capsys, str(models / "a"), "is another architecture (model_type 'gpt2', the base is 'bert')")


def test_no_samples(models, capsys):
    (models / "texts.txt").write_text("\n")
    assert_refused(models, capsys, "texts.txt: holds no samples", method="lot", calibration={"data": "texts.txt"})


def test_no_experts(models, capsys):
    assert_refused(models, capsys, "recipe.yaml:3:1: models: expected a list of at least one expert", experts=[])


def test_typo_in_the_recipe(models, capsys):
    assert_refused(models, capsys, "recipe.yaml:6:1: paramters: unknown key (did you mean 'parameters'?)", paramters={})


def test_hyperparameter_out_of_range(models, capsys):
    assert_refused(models, capsys, "density: expected a number in (0, 1]", method="ties", parameters={"density": 2.0})


@pytest.mark.parametrize("keep", [5, 100, -1])
def test_truncated_safetensors(models, capsys, keep):
    weights = models / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert_refused(models, capsys, str(weights))


def test_unreadable_shard(models, capsys):
    shard = sorted((models / "b").glob("model-*.safetensors"))[1]
    shard.unlink()
    shard.mkdir()
    assert_refused(models, capsys, str(shard), "cannot be read: Is a directory")


def test_malicious_pickle(models, capsys):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(models / "ran"),)

    torch.save({"w": Hostile()}, models / "evil.pt")
    assert_refused(models, capsys, "evil.pt", "code", experts=["evil.pt"])


def test_configuration_without_a_known_architecture(models, capsys):
    config = json.loads((models / "base" / "config.json").read_text())
    (models / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["OtherModel"]}))
    data = {"calibration": {"data": "texts.txt"}}
    assert_refused(models, capsys, "config.json: transformers has no architecture 'OtherModel'", method="lot", **data)


def test_tensors_that_are_not_those_of_the_architecture(models, capsys):
    data = {"calibration": {"data": "texts.txt"}}
    for name in ("base", "a", "b"):
        save_tiny_bert(models / name)
        rewrite(models / name, lambda state: state.update(extra=torch.ones(2)))
    assert_refused(
        models, capsys, f"{models / 'base'}: has tensor 'extra', which BertModel has not", method="lot", **data
    )
    for name in ("base", "a", "b"):
        rewrite(models / name, lambda state: [state.pop("extra"), state.pop("pooler.dense.bias")])
    assert_refused(
        models, capsys, f"{models / 'base'}: lacks tensor 'pooler.dense.bias' of BertModel", method="lot", **data
    )


FULL_DISK = """
import resource, sys
from statsmerge_ext.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk(models, monkeypatch, capsys):
    command = ["merge", str(write_recipe(models)), str(models / "out"), "--quiet"]
    before = files_in(models)
    result = subprocess.run([sys.executable, "-c", FULL_DISK, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {models / 'out'}: cannot be written: ")
    assert result.stderr.count("\n") == 1
    assert files_in(models) == before

    monkeypatch.setattr("statsmerge_ext.run.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_refused(models, capsys, "but only 0.00 GB are free there")


def test_interruption(models, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    before = sorted([*files_in(models), "recipe.yaml"])
    for place in (writing, output):  # of a merge in memory, and of one that is written while it is computed
        monkeypatch.setattr(place, "ShardedWeights", interrupt)
    data = {"method": "lot", "calibration": {"data": "texts.txt"}}
    for recipe in ({}, data, {**data, "buffers": "reestimate"}):
        assert merge(models, **recipe) == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert before == files_in(models)


def test_defects_are_one_line_too_and_a_traceback_on_demand(models, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("boom")

    monkeypatch.setattr("statsmerge_ext.run.solve", fail)
    assert_refused(models, capsys, "error: RuntimeError: boom (-v shows where)")
    assert merge(models, "-v") == 2
    assert "Traceback" in capsys.readouterr().err
