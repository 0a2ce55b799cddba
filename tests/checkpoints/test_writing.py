"""Writing: what is written is read back the same, and what fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from statsmerge_ext.checkpoints import open_checkpoint, save_hf_directory, save_state_dict, writing
from statsmerge_ext.errors import CheckpointError
from tests.tiny_models import files_in, save_tiny_bert, save_tiny_tokenizer, tiny_bert

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}


def assert_holds(path, state):
    checkpoint = open_checkpoint(path)
    assert set(checkpoint) == set(state)
    assert all(
        torch.equal(checkpoint[name], tensor) and checkpoint.dtype(name) == tensor.dtype
        for name, tensor in state.items()
    )


@pytest.fixture
def base(tmp_path):
    path = save_tiny_bert(tmp_path / "base")
    save_tiny_tokenizer(path)
    (path / "preprocessor_config.json").write_text('{"size": 4}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "optimizer.pt").write_bytes(b"not to be copied")
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_state_dict_round_trip(tmp_path, suffix):
    path = tmp_path / "deeper" / f"x{suffix}"
    save_state_dict(STATE, path)
    assert_holds(path, STATE)
    assert files_in(tmp_path) == ["deeper", f"deeper/x{suffix}"]


def test_shared_memory_is_written(tmp_path):
    """safetensors refuses tensors that share memory; views, transposes and aliases still have to be saved."""
    whole = torch.randn(4, 4)
    state = {"whole": whole, "alias": whole, "top": whole[:2], "transposed": whole.t()}
    save_state_dict(state, tmp_path / "x.safetensors")
    assert_holds(tmp_path / "x.safetensors", {name: state[name] for name in ("whole", "top", "transposed")})


def test_other_users_can_read_what_the_umask_lets_them(tmp_path):
    old = os.umask(0o022)
    try:
        save_state_dict(STATE, tmp_path / "x.safetensors")
        save_hf_directory(STATE, tmp_path / "m")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "m" / "model.safetensors").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_directory_loads_with_transformers(tmp_path, base, shard_size):
    state = {name: tensor + 1 for name, tensor in tiny_bert().state_dict().items()}
    save_hf_directory(state, tmp_path / "out", base, shard_size, {"note.txt": "x"})
    weights = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if shard_size == "5GB":
        assert weights == ["model.safetensors"]
    else:
        count = len(weights)
        assert count > 2
        assert weights == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(state)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("disk full")["input_ids"] == [3, 7]
    others = {
        "preprocessor_config.json",
        "1_Pooling/config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "note.txt",
    }
    assert others <= set(files_in(tmp_path / "out"))
    assert "optimizer.pt" not in files_in(tmp_path / "out")


def test_tokenizer_can_be_left_out(tmp_path, base):
    save_hf_directory(tiny_bert().state_dict(), tmp_path / "out", base, copy_tokenizer=False)
    assert not any(name.startswith("tokenizer") for name in files_in(tmp_path / "out"))
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        (
            {"torch_dtype": "float32", "text_config": {"dtype": "float32", "layers": [1]}},
            {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "layers": [1]}},
        ),
    ],
)
def test_configuration_names_the_dtype_that_is_written(tmp_path, base, config, expected):
    (base / "config.json").write_text(json.dumps(config))
    state = {name: tensor.bfloat16() for name, tensor in tiny_bert().state_dict().items()}
    save_hf_directory(state, tmp_path / "out", base)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def test_tied_weights_are_written_under_the_names_of_the_base(tmp_path):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40, n_positions=8)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    state = dict(reversed(model.state_dict().items()))
    assert next(iter(state)) == "lm_head.weight"
    save_hf_directory(state, tmp_path / "out", tmp_path / "base")
    assert set(open_checkpoint(tmp_path / "out")) == set(open_checkpoint(tmp_path / "base"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), (7, 7), ("2MiB", 2**21), ("9", 9)]
)
def test_sizes(size, expected):
    assert writing.parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "5XB", "-1GB", "0", "GB", "many"])
def test_bad_sizes(tmp_path, size):
    with pytest.raises(CheckpointError, match="shard size"):
        save_hf_directory(STATE, tmp_path / "out", shard_size=size)
    assert files_in(tmp_path) == []


def test_existing_output_is_refused_then_replaced(tmp_path):
    other = {"z": torch.ones(1)}
    for out, save in ((tmp_path / "x.pt", save_state_dict), (tmp_path / "m", save_hf_directory)):
        save(STATE, out)
        with pytest.raises(CheckpointError, match=f"{out.name}: exists already"):
            save(other, out)
        assert_holds(out, STATE)
        save(other, out, overwrite=True)
        assert_holds(out, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "x.pt"]


def test_empty_directory_is_taken_and_a_foreign_one_never_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    save_hf_directory(STATE, tmp_path / "empty")
    assert_holds(tmp_path / "empty", STATE)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(CheckpointError, match="photos: is a directory without a model"):
        save_hf_directory(STATE, tmp_path / "photos", overwrite=True)
    assert files_in(tmp_path / "photos") == ["cat.png"]


def test_unknown_suffix(tmp_path):
    with pytest.raises(CheckpointError, match="unknown suffix '.gguf'"):
        save_state_dict(STATE, tmp_path / "x.gguf")


FULL_DISK = """
import resource, sys, torch
from statsmerge_ext.checkpoints import save_hf_directory, save_state_dict
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
save = save_hf_directory if sys.argv[2] == "directory" else save_state_dict
save({"a": torch.ones(50, 50), "b": torch.ones(200, 200)}, sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize(("kind", "name"), [("directory", "m"), ("file", "x.safetensors"), ("file", "x.pt")])
def test_a_write_that_the_system_cuts_short_leaves_the_old_output(tmp_path, kind, name):
    """A real failure in the middle of a file: the system allows files of 60 kB, the weights take 170 kB."""
    save = save_hf_directory if kind == "directory" else save_state_dict
    save(STATE, tmp_path / name)
    before = files_in(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / name, kind], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"CheckpointError: {tmp_path / name}: cannot be written: " in result.stderr
    assert "File too large" in result.stderr
    assert files_in(tmp_path) == before
    assert_holds(tmp_path / name, STATE)


@pytest.mark.parametrize("failing", ["ShardedWeights", "_copy_files", "_sync", "move_into_place"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_at_any_step_leaves_nothing(tmp_path, base, monkeypatch, failing, error):
    def fail(*arguments, **options):
        raise error

    before = files_in(tmp_path)
    monkeypatch.setattr(writing, failing, fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save_hf_directory(tiny_bert().state_dict(), tmp_path / "out", base)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'out'}: cannot be written: No space left on device"
    assert files_in(tmp_path) == before


def test_a_failed_replacement_puts_the_old_directory_back(tmp_path, monkeypatch):
    save_hf_directory(STATE, tmp_path / "m")
    rename = os.replace

    def fail_for_the_new_one(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(writing.os, "replace", fail_for_the_new_one)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_hf_directory({"z": torch.ones(1)}, tmp_path / "m", overwrite=True)
    assert_holds(tmp_path / "m", STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
