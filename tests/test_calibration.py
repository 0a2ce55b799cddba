"""Calibration data: what is read, and what is refused; labels above all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from statsmerge_ext.calibration import DEFAULT_SAMPLES, as_unlabelled_batches, read_samples
from statsmerge_ext.errors import CalibrationError, CheckpointError
from tests.tiny_models import WORDS, save_tiny_tokenizer


def test_batches_pass_unchanged():
    batches = [torch.ones(2, 3), {"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    checked = as_unlabelled_batches("mnist", iter(batches))
    assert checked[0] is batches[0]
    assert checked[1] == batches[1]


def test_empty_and_exhausted_loaders():
    with pytest.raises(CalibrationError, match="calibration for 'mnist': the loader gave no batch"):
        as_unlabelled_batches("mnist", [])
    loader = iter([torch.ones(2, 3)])
    as_unlabelled_batches("mnist", loader)
    with pytest.raises(CalibrationError, match="empty or already exhausted"):
        as_unlabelled_batches("mnist", loader)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([(torch.ones(2, 3), torch.ones(2))], "batch 0: got a tuple of 2, .* without their labels"),
        ([[torch.ones(2, 3), torch.ones(2)]], "batch 0: got a list of 2"),
        ([torch.ones(1), {"x": torch.ones(2), "labels": torch.ones(2)}], "batch 1: has 'labels'"),
        ([{"x": torch.ones(2), "Label": torch.ones(2)}], "batch 0: has 'label'"),
        ([{"x": torch.ones(2), "target": torch.ones(2)}], "batch 0: has 'target'"),
        ([{"x": [1, 2]}], "batch 0, 'x': got a list"),
        ([{}], "batch 0: is an empty mapping"),
        (["text"], "batch 0: got a str"),
        ([torch.ones(0, 3)], r"batch 0: has shape \[0, 3\]"),
        ([torch.tensor(1.0)], r"batch 0: has shape \[\]"),
        ([torch.tensor([1.0, float("nan")])], "batch 0: holds NaN"),
        (torch.ones(2, 3), "got a Tensor, expected an iterable of batches"),
        ({"x": torch.ones(2)}, "got a dict, expected an iterable of batches"),
        (None, "got a NoneType, expected an iterable of batches"),
    ],
)
def test_bad_batches_are_refused(loader, message):
    with pytest.raises(CalibrationError, match=f"calibration for 'mnist'.*{message}"):
        as_unlabelled_batches("mnist", loader)


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "base"
    path.mkdir()
    save_tiny_tokenizer(path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_texts_are_tokenised_padded_and_cut(tmp_path, tokenizer, suffix):
    texts = ["the disk", "the disk of server is full", "network slow again today"]
    records = [json.dumps({"text": text, "label": 1}) for text in texts]
    path = tmp_path / f"x{suffix}"
    path.write_text("\n\n".join(texts if suffix == ".txt" else records) + "\n")
    batches = read_samples(path, tokenizer=tokenizer, samples=3, batch_size=2, max_length=5)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert all("label" not in batch for batch in batches)
    decoded = {
        " ".join(WORDS[token] for token in row[mask.bool()])
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert decoded == {"the disk", "the disk of server is", "network slow again today"}


def test_samples_are_drawn_by_seed_without_replacement(tmp_path):
    save_file({"x": torch.arange(100.0).view(100, 1)}, tmp_path / "x.safetensors")

    def draw(**options):
        return torch.cat(read_samples(tmp_path / "x.safetensors", **options)).flatten().tolist()

    assert draw(samples=20, seed=1) == draw(samples=20, seed=1) != draw(samples=20, seed=2)
    assert len(set(draw(samples=100))) == 100
    assert len(draw()) == DEFAULT_SAMPLES


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_tensors(tmp_path, suffix):
    def save(**arrays):
        path = tmp_path / f"x{suffix}"
        np.savez(path, **arrays) if suffix == ".npz" else save_file(
            {key: torch.from_numpy(array) for key, array in arrays.items()}, path
        )
        return path

    images = np.random.default_rng(0).standard_normal((5, 3, 4, 4), dtype=np.float32)
    batches = read_samples(save(images=images), batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 4, 4)]
    ids = np.arange(10).reshape(5, 2)
    (batch,) = read_samples(save(input_ids=ids, attention_mask=np.ones_like(ids)))
    assert set(batch) == {"input_ids", "attention_mask"}
    assert sorted(batch["input_ids"][:, 0].tolist()) == [0, 2, 4, 6, 8]
    with pytest.raises(CalibrationError, match="different numbers of samples"):
        read_samples(save(a=ids, b=ids[:3]))
    with pytest.raises(CalibrationError, match="has 'labels'"):
        read_samples(save(a=ids, labels=ids + 1))
    with pytest.raises(CalibrationError, match="holds 5 samples, 6 were asked for"):
        read_samples(save(a=ids), samples=6)
    with pytest.raises(CalibrationError, match="at least one sample"):
        read_samples(save(a=ids[:0]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\n  \n", "holds no samples"),
        ("x.txt", b"\xff\xfe\x00\xd8", "cannot be read as UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{oops\n', "x.jsonl, line 2: is not JSON"),
        ("x.jsonl", b'{"txt": "a"}\n', 'line 1: expected an object with a string under "text"'),
        ("x.npz", b"PK\x03\x04 truncated", "cannot be read as an .npz"),
        ("x.csv", b"a,b\n", "unknown suffix '.csv'"),
    ],
)
def test_bad_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_samples(tmp_path / name, tokenizer=tokenizer)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{"code": 1}], dtype=object))
    with pytest.raises(CalibrationError, match="x.npz: cannot be read"):
        read_samples(tmp_path / "x.npz")


def test_missing_files_and_tokenizers_are_named(tmp_path):
    with pytest.raises(CalibrationError, match="x.txt: no such file"):
        read_samples(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("a text\n")
    with pytest.raises(CalibrationError, match="has no tokenizer files"):
        read_samples(tmp_path / "x.txt", tokenizer=tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="x.safetensors: 5 bytes"):
        read_samples(tmp_path / "x.safetensors")
