"""Opening checkpoints: every form that is read, and every kind of damage that is refused with file and tensor named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.errors import CheckpointError
from tests.tiny_models import save_tiny_bert, tiny_bert

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}


def assert_same(checkpoint, state):
    assert set(checkpoint) == set(state)
    for name, tensor in state.items():
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)


def write_raw(path, entries, data=b"", length=None):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_reads_directories_of_transformers(tmp_path, shard_size):
    save_tiny_bert(tmp_path / "m", max_shard_size=shard_size)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert_same(checkpoint, tiny_bert().state_dict())
    assert checkpoint.config["model_type"] == "bert"


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_directories_with_pickled_weights(tmp_path, sharded):
    state = tiny_bert().state_dict()
    names = list(state)
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, tmp_path / file)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, state)
    assert checkpoint.config is None


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_reads_state_dict_files(tmp_path, suffix, key):
    torch.save(STATE if key is None else {key: STATE, "epoch": 3}, tmp_path / f"x{suffix}")
    assert_same(open_checkpoint(tmp_path / f"x{suffix}"), STATE)


def test_reads_files_of_the_old_torch_format(tmp_path):
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(open_checkpoint(tmp_path / "x.pt"), STATE)


def test_reads_single_safetensors_with_metadata(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors", metadata={"made": "here"})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert_same(checkpoint, STATE)
    assert checkpoint.metadata == {"made": "here"}
    assert checkpoint.file("a") == tmp_path / "x.safetensors"


def test_widens_floating_point_only_and_never_narrows(tmp_path):
    state = {**STATE, "d": torch.ones(2, dtype=torch.float64)}
    save_file(state, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", at_least=torch.float32)
    read = {name: checkpoint[name].dtype for name in checkpoint}
    assert read == {"a": torch.float32, "b": torch.float32, "n": torch.int64, "d": torch.float64}
    assert checkpoint.dtype("b") == torch.bfloat16


def test_truncated_at_any_byte_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(STATE, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="x.safetensors"):
            open_checkpoint(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        (b"{not json", b"", "not JSON"),
        (b"[1]", b"", "expected an object"),
        (b"\xff\xfe\x00", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        ({"a": {"dtype": "F32"}}, b"", "'a'.*lacks"),
        ({"a": 3}, b"", "'a'.*lacks"),
        ({"a": {**F32, "dtype": "F3"}}, bytes(8), "'a'.*'F3' is not supported"),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), "'a'.*is not supported"),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), "'a'.*shape"),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), "'a'.*shape"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), "'a'.*shape"),
        ({"a": {**F32, "shape": [2**70]}}, bytes(8), "'a'.*shape"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "'a'.*data_offsets"),
        ({"a": {**F32, "data_offsets": [0, 8, 8]}}, bytes(8), "'a'.*data_offsets"),
        ({"a": {**F32, "data_offsets": [0, 16]}}, bytes(8), "'a'.*truncated"),
        ({"a": {**F32, "shape": [3]}}, bytes(8), "'a'.*8 bytes stored, expected 12"),
        ({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(8), "'a'.*8 bytes stored"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "'b'.*overlaps"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20), "'b'.*belong to no tensor"),
        ({"a": F32}, bytes(9), "cover 8 bytes of data, but the file holds 9"),
        ({"__metadata__": {"a": 1}, "a": F32}, bytes(8), "__metadata__"),
        (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}', b"", "'a' appears twice"),
        ({}, b"", "holds no tensors"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, entries, data, message):
    path = write_raw(tmp_path / "x.safetensors", entries, data)
    with pytest.raises(CheckpointError, match=f"x.safetensors: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [2**63, 10**9, 101_000_000, 50])
def test_header_lengths_beyond_the_file_are_refused(tmp_path, length):
    path = write_raw(tmp_path / "x.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match="its header claims"):
        open_checkpoint(path)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "..\\x"])
def test_index_must_stay_in_its_directory(tmp_path, shard):
    save_file(STATE, tmp_path / "out.safetensors")
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="index.json: tensor 'a' points to"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "one.safetensors", "z": "one.safetensors"}}, "one.safetensors: tensor 'z' is missing"),
        ({"weight_map": {"a": "two.safetensors"}}, "two.safetensors: missing shard.*'a'"),
        ({"weight_map": {}}, "index.json: 'weight_map'"),
        ({"weight_map": {"a": 3}}, "index.json: 'weight_map'"),
        ({}, "index.json: 'weight_map'"),
        ([], "index.json: holds a JSON list"),
    ],
)
def test_bad_indices_are_refused(tmp_path, index, message):
    save_file(STATE, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


class Hostile:
    """What unpickles into a call."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_pickles_with_code_are_refused_and_not_run(tmp_path, plain_pickle):
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"a": Hostile(marker)}, protocol=2))
    else:
        torch.save({"a": Hostile(marker)}, path)
    with pytest.raises(CheckpointError, match="x.pt: it is damaged, or holds Python objects or code"):
        open_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"hello, this is not a checkpoint", b"PK\x03\x04 nor is this", bytes(64)])
def test_foreign_files_are_refused(tmp_path, content):
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"x{suffix}"):
            open_checkpoint(path)


@pytest.mark.parametrize("old_format", [False, True])
def test_truncated_pickles_are_refused(tmp_path, old_format):
    path = tmp_path / "x.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="x.pt: (is truncated|it is damaged)"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"a": torch.ones(2), "epoch": 3}, "entry 'epoch' is a int"),
        ({3: torch.ones(2)}, "entry 3 is a Tensor"),
        ({"a": torch.eye(2).to_sparse()}, "tensor 'a' is stored as torch.sparse"),
        ({}, "holds no tensors"),
    ],
)
def test_pickles_without_a_state_dict_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


def test_missing_and_unknown_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds none of model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="x.gguf: unknown kind of file '.gguf'"):
        open_checkpoint(tmp_path / "x.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a PEFT adapter"):
        open_checkpoint(tmp_path)


def test_broken_configuration_is_named(tmp_path):
    save_tiny_bert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: is not valid JSON"):
        open_checkpoint(tmp_path)


def test_threads_that_read_at_once_share_one_open_file(tmp_path, monkeypatch):
    values = torch.arange(1000.0)
    save_file({"a": values}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    opened = []

    def slow_open(*arguments, **options):
        opened.append(arguments)
        time.sleep(0.05)  # the others arrive meanwhile
        return open(*arguments, **options)

    monkeypatch.setattr("statsmerge_ext.checkpoints.file_formats.open", slow_open, raising=False)
    with ThreadPoolExecutor(4) as threads:
        runs = list(threads.map(lambda start: checkpoint.run("a", start, start + 10), range(0, 1000, 10)))
    assert torch.equal(torch.cat(runs), values) and len(opened) == 1
