"""Experts of another vocabulary: refused with what differs, or merged where they share the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from statsmerge_ext import run_merge
from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.checkpoints.vocabulary import in_vocabulary_of
from statsmerge_ext.errors import CheckpointError, RecipeError
from tests.test_blockwise import loaded
from tests.tiny_models import assert_refused, write_recipe
from tests.tiny_transformers import save_family

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
BASE = {f"t{number}": number for number in range(48)}  # two of the model's 50 rows are padding
#: Of the expert: some tokens where they are in the base, some elsewhere, five that are not there, three of its own.
OTHER = {f"t{number}": number for number in range(20)}
OTHER |= {f"t{number}": 67 - number for number in range(25, 48)} | {"x": 43, "y": 44, "<z>": 45}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def save_tokens(directory: Path, tokens: dict[str, int], kind: str = "WordLevel") -> None:
    added = [{"id": number, "content": token} for token, number in tokens.items() if token.startswith("<")]
    known = {token: number for token, number in tokens.items() if not token.startswith("<")}
    if kind == "Unigram":
        known = [[token, 0.0] for token in sorted(known, key=known.get)]
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": known}, "added_tokens": added}))


def change(directory: Path, tensors: dict[str, torch.Tensor], vocabulary: int) -> None:
    """Save an expert in one file with other tensors and another size of the vocabulary."""
    state = {**dict(open_checkpoint(directory)), **tensors}
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(state, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))


def save_vocabularies(directory: Path, family: str = "llama", tokens=OTHER, rows: int = 46) -> Path:
    """A family of which "a" has the vocabulary ``tokens``, and "aligned" is the same with the base's."""
    models = save_family(directory, family)
    save_tokens(models / "base", BASE)
    save_tokens(models / "b", BASE)
    save_tokens(models / "a", tokens)
    base, a = open_checkpoint(models / "base"), open_checkpoint(models / "a")
    tables = [name for name in TABLES if name in base]
    theirs = {name: torch.randn(rows, 16, generator=torch.Generator().manual_seed(7)) for name in tables}
    aligned = {name: base[name].clone() for name in tables}
    for token in BASE.keys() & tokens.keys():
        for name in tables:
            aligned[name][BASE[token]] = theirs[name][tokens[token]]
    (models / "aligned").mkdir()
    save_file({**dict(a), **aligned}, models / "aligned" / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (models / "aligned" / name).write_text((models / "base" / name).read_text())
    save_file(load_file(models / "a.safetensors"), models / "aligned.safetensors")
    change(models / "a", theirs, rows)
    return models


def merge(models: Path, out: str, expert: str, method: str = "task_arithmetic", **content) -> dict:
    if method == "lot":
        data = {name: f"{name}.safetensors" for name in (expert, "b")}
        content["calibration"] = {"data": data, "batch_size": 4}
    recipe = write_recipe(models, method, [expert, "b"], **content)
    return run_merge(recipe, models / out, progress=False)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "lot"])
@pytest.mark.parametrize("suffix", ["", ".pt"])
def test_the_common_part_is_merged_as_if_the_expert_had_the_bases_vocabulary(tmp_path, method, suffix):
    """Streamed, block by block, and in memory."""
    models = save_vocabularies(tmp_path)
    report = merge(models, f"out{suffix}", "a", method, vocab="common")
    expected = merge(models, f"expected{suffix}", "aligned", method)
    assert report["vocabulary"] == {"a": {"common": 43, "missing": 5, "dropped": 3}}
    assert "vocabulary" not in expected
    merged, same = open_checkpoint(models / f"out{suffix}"), open_checkpoint(models / f"expected{suffix}")
    assert list(merged) == list(same)
    assert [name for name in same if not torch.equal(merged[name], same[name])] == []
    if not suffix:
        assert json.loads((models / "out" / "config.json").read_text())["vocab_size"] == 50
        assert json.loads((models / "out" / "tokenizer.json").read_text())["model"]["vocab"] == BASE


def test_rows_of_tokens_that_an_expert_lacks_have_no_task_vector(tmp_path):
    models = save_vocabularies(tmp_path)
    merge(models, "out", "a", vocab="common", parameters={"scaling_factor": 0.5})
    base, b, merged = (load_file(models / name / "model.safetensors") for name in ("base", "base", "out"))
    b = dict(open_checkpoint(models / "b"))
    a = open_checkpoint(models / "a")
    for name in TABLES:
        for token, row in BASE.items():
            start, delta = base[name][row].double(), (b[name][row] - base[name][row]).double()
            if token in OTHER:
                delta = delta + (a[name][OTHER[token]] - base[name][row]).double()
            torch.testing.assert_close(merged[name][row].double(), start + 0.5 * delta, rtol=1e-6, atol=1e-6)


def test_a_model_in_transformers_older_names_is_read_with_the_bases_vocabulary(tmp_path):
    """A mixture, whose files transformers converts on loading: the whole model is built of what is read."""
    models = save_vocabularies(tmp_path, "mixtral")
    merge(models, "out.pt", "a", "lot", vocab="common")
    merge(models, "expected.pt", "aligned", "lot")
    merged, expected = open_checkpoint(models / "out.pt"), open_checkpoint(models / "expected.pt")
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []


def test_a_tied_table_may_be_stored_twice(tmp_path):
    models = save_vocabularies(tmp_path, "qwen2")
    twice = {"lm_head.weight": open_checkpoint(models / "a")["model.embed_tokens.weight"]}
    merge(models, "expected", "aligned")
    change(models / "a", {name: tensor.clone() for name, tensor in twice.items()}, 46)
    merge(models, "out", "a", vocab="common")
    merged, expected = loaded(models / "out"), loaded(models / "expected")
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []


@settings(deadline=None, max_examples=60)
@given(
    st.permutations(range(9)),
    st.integers(0, 27),
    st.integers(0, 27),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_run_of_a_table(tmp_path_factory, order, start, stop, dtype):
    start, stop = sorted((start, stop))
    directory = tmp_path_factory.mktemp("run")
    tables = {"base": torch.arange(27.0).view(9, 3), "a": 100 + torch.arange(21.0).view(7, 3)}
    for name, table in tables.items():
        (directory / name).mkdir()
        save_file(
            {"lm_head.weight": table.to(dtype if name == "a" else torch.float32)},
            directory / name / "model.safetensors",
        )
    save_tokens(directory / "base", {str(i): i for i in range(9)})
    save_tokens(directory / "a", {str(token): i for i, token in enumerate(order[:7])})
    base, a = (open_checkpoint(directory / name) for name in tables)
    fitting, _ = in_vocabulary_of(base, {"a": a}, common=True)
    expected = tables["base"].clone()
    for row, token in enumerate(order[:7]):
        expected[token] = tables["a"][row]
    table = fitting["a"]
    assert table.dtype("lm_head.weight") == torch.float32
    assert torch.equal(table["lm_head.weight"], expected)
    into = torch.empty(27 * 4, dtype=torch.uint8)
    for memory in (None, into):
        assert torch.equal(table.run("lm_head.weight", start, stop, memory), expected.flatten()[start:stop])


def test_a_vocabulary_of_scores(tmp_path):
    models = save_vocabularies(tmp_path, tokens={f"t{number}": 47 - number for number in range(48)}, rows=48)
    merge(models, "expected", "a", vocab="common")
    save_tokens(models / "a", {f"t{number}": 47 - number for number in range(48)}, "Unigram")
    merge(models, "out", "a", vocab="common")
    first, second = (load_file(models / name / "model.safetensors") for name in ("expected", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_vocabulary_is_left_alone(tmp_path):
    models = save_vocabularies(tmp_path)
    fitting, counts = in_vocabulary_of(*_opened(models, "aligned"), common=True)
    assert counts == {} and type(fitting["aligned"]) is type(open_checkpoint(models / "base"))
    # A token in a row that is padding in the base is in nobody's way.
    save_tokens(models / "aligned", {**BASE, "<end>": 48})
    assert in_vocabulary_of(*_opened(models, "aligned"), common=False)[1] == {}


def test_another_vocabulary_is_refused_with_what_differs(tmp_path, capsys):
    models = save_vocabularies(tmp_path)
    sizes = "tensor 'lm_head.weight' has 46 rows, the base's has 50"
    moved = "23 common tokens have other numbers ('t25' is 42, not 25)"
    alone = "only it has 3 tokens ('x', …); only the base has 5 tokens ('t20', …)"
    assert_refused(
        models, capsys, "expert 'a'", "another vocabulary than the base", sizes, moved, alone, "vocab: common"
    )
    swapped = {**BASE, "t3": 4, "t4": 3}
    save_tokens(models / "aligned", swapped)
    with pytest.raises(CheckpointError, match=r"2 common tokens have other .* \('t3' is 4, not 3\); merge the part"):
        merge(models, "out", "aligned")


def test_what_cannot_be_matched_is_refused(tmp_path):
    models = save_vocabularies(tmp_path)
    save_tokens(models / "a", {"x": 0, "y": 1})
    with pytest.raises(CheckpointError, match="its vocabulary has no token in common with the base's"):
        merge(models, "out", "a", vocab="common")
    (models / "a" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"a/tokenizer.json: has no vocabulary that could be read"):
        merge(models, "out", "a", vocab="common")
    save_tokens(models / "a", {"x": -1})
    with pytest.raises(CheckpointError, match=r"numbers its tokens otherwise than by natural numbers"):
        merge(models, "out", "a", vocab="common")
    (models / "a" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"another vocabulary, but .*a/tokenizer.json is missing"):
        merge(models, "out", "a", vocab="common")
    with pytest.raises(CheckpointError, match=r"has 46 rows, the base's has 50; merge the common part"):
        merge(models, "out", "a")


def test_recipe_and_option(tmp_path):
    models = save_vocabularies(tmp_path)
    with pytest.raises(RecipeError, match="vocab: got 'union', expected one of same, common"):
        merge(models, "out", "a", vocab="union")
    with pytest.raises(RecipeError, match="vocab: 'common' gives the base's vocabulary, but the tokenizer is of"):
        merge(models, "out", "a", vocab="common", tokenizer_source="a")
    recipe = write_recipe(models, experts=["a", "b"])
    with pytest.raises(RecipeError, match="vocab: got 'union'"):
        run_merge(recipe, models / "out", vocab="union", progress=False)
    assert "a" in run_merge(recipe, models / "out", vocab="common", progress=False)["vocabulary"]


def _opened(models: Path, expert: str) -> tuple:
    return open_checkpoint(models / "base"), {expert: open_checkpoint(models / expert)}
