"""Experts as quantised task vectors: written, read by every road into a merge, and refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from statsmerge_ext import merge
from statsmerge_ext.checkpoints import (
    open_checkpoint,
    open_expert,
    quantize_expert,
    quantize_experts,
    quantizing,
    save_state_dict,
)
from statsmerge_ext.cli import main
from statsmerge_ext.errors import CheckpointError
from statsmerge_ext.ops import QuantizedTensor
from tests.tiny_models import files_in, save_tiny_family
from tests.tiny_models import merge as merge_on_disk

STEPS = {2: 3, 3: 7, 4: 15, 8: 255}


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (2, 3, 3, 3), "scalar": (), "empty": (0, 4)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["position"] = torch.arange(4)
    experts = {
        expert: {
            name: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in base.items()
        }
        for expert in ("x", "y", "z")
    }
    return base, experts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 8])
def test_values_are_within_half_a_step(models, tmp_path, bits, group_size):
    base, experts = models
    path = tmp_path / "x.safetensors"
    quantize_expert(base, experts["x"], path, bits=bits, group_size=group_size)
    read = open_expert(path, base)
    assert set(read) == {name for name, t in base.items() if t.is_floating_point()}
    for name, tensor in read.items():
        moved = experts["x"][name] - base[name]
        step = (moved.max() - moved.min()) / STEPS[bits] if moved.dim() > 1 and moved.numel() else 0
        assert read.shape(name) == tensor.shape == moved.shape
        # the zero point is rounded too, which may cost the outermost codes another half
        assert torch.all((tensor - base[name] - moved).abs() <= step * 1.001 + 1e-6), name


@pytest.mark.parametrize("group_size", [None, 8, 24, 4096])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_runs_make_up_what_is_quantised_at_once(monkeypatch, bits, group_size):
    monkeypatch.setattr(quantizing, "_RUN", 64)
    for count in (1, 63, 64, 65, 128, 1003):
        flat = torch.randn(count, generator=torch.Generator().manual_seed(count))
        whole = QuantizedTensor.quantize(flat, bits, group_size)
        runs = list(quantizing._quantized_runs(flat, bits, group_size))
        assert torch.equal(torch.cat([run.codes for _, run in runs]), whole.codes)
        assert torch.equal(torch.cat([run.dequantize() for _, run in runs]), whole.dequantize())
        scales = torch.cat([run.scale for _, run in runs])
        assert torch.equal(scales if group_size else scales.unique(), whole.scale)


def test_the_residual_form_is_smaller_and_nearer(tmp_path):
    """RTVQ's 2 + 3/K bits beat 2 bits where the experts have much in common."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(64, 64, generator=generator)}
    common = torch.randn(64, 64, generator=generator)
    experts = {
        name: {"w": base["w"] + common + 0.2 * torch.randn(64, 64, generator=generator)} for name in ("x", "y", "z")
    }
    quantize_experts(base, experts, tmp_path / "residual")
    assert files_in(tmp_path / "residual") == [f"{n}.safetensors" for n in ("shared", "x", "y", "z")]
    for name, state in experts.items():
        quantize_expert(base, state, tmp_path / f"{name}.safetensors", bits=2)
        errors = [
            (open_expert(path, base)["w"] - state["w"]).norm()
            for path in (tmp_path / "residual" / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        ]
        assert errors[0] < 0.5 * errors[1]
    shared = open_expert(tmp_path / "residual" / "shared.safetensors", base)["w"] - base["w"]
    mean = torch.stack([s["w"] - base["w"] for s in experts.values()]).mean(0)
    assert (shared - mean).abs().max() <= (mean.max() - mean.min()) / 7


def test_the_format_can_be_read_by_its_description(models, tmp_path):
    base, experts = models
    path = tmp_path / "x.safetensors"
    quantize_expert(base, experts["x"], path, bits=4)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    raw = load_file(path)
    assert facts["bits"] == 4 and facts["group_size"] is None and facts["shared"] is None
    codes = torch.stack([raw["a.weight.codes"] & 15, raw["a.weight.codes"] >> 4], 1).flatten()[:35].float()
    values = (raw["a.weight.scale"] * (codes - raw["a.weight.zero_point"])).reshape(facts["shapes"]["a.weight"])
    torch.testing.assert_close(open_expert(path, base)["a.weight"], base["a.weight"] + values)
    torch.testing.assert_close(raw["a.bias"], experts["x"]["a.bias"] - base["a.bias"])


def test_what_an_expert_did_not_change_takes_no_bytes(models, tmp_path):
    base, experts = models
    for state in experts.values():
        state["b.weight"] = base["b.weight"]
    experts["x"]["a.bias"] = base["a.bias"]
    quantize_experts(base, experts, tmp_path / "all", bits=8, shared_bits=8)
    stored = {name: {key.partition(".codes")[0] for key in load_file(path)} for name, path in _files(tmp_path / "all")}
    assert not any(key.startswith("b.weight") for keys in stored.values() for key in keys)
    assert "a.bias" in stored["y"] and "a.bias" not in stored["x"] and "a.bias" not in stored["shared"]
    for name, state in experts.items():
        read = open_expert(tmp_path / "all" / f"{name}.safetensors", base)
        assert torch.equal(read["b.weight"], base["b.weight"])
        torch.testing.assert_close(read["a.bias"], state["a.bias"], rtol=0, atol=1e-6)


def _files(folder):
    return [(path.stem, path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_methods_read_them_as_experts(models, tmp_path, method):
    base, experts = models
    for name, state in experts.items():
        quantize_expert(base, state, tmp_path / f"{name}.safetensors", bits=8)
    exact = merge(method, base=base, experts=experts).state
    paths = {name: tmp_path / f"{name}.safetensors" for name in experts}
    merged = merge(method, base=base, experts=paths).state
    dequantised = merge(method, base=base, experts={n: dict(open_expert(p, base)) for n, p in paths.items()}).state
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, dequantised[name])
        if method != "ties":
            torch.testing.assert_close(tensor, exact[name], rtol=0, atol=5e-3)


@pytest.mark.parametrize("residual", [False, True])
def test_the_command_line_writes_and_merges_them(tmp_path, residual):
    directory = save_tiny_family(tmp_path)
    base = str(directory / "base")
    if residual:
        arguments = [
            str(directory / "a"),
            str(directory / "b"),
            "--out",
            str(directory / "q"),
            "--residual",
            "--bits=8",
        ]
        assert main(["quantize", base, *arguments, "--quiet"]) == 0
    else:
        (directory / "q").mkdir()
        for name in "ab":
            out = str(directory / "q" / f"{name}.safetensors")
            assert main(["quantize", base, str(directory / name), "--out", out, "--bits=8", "--quiet"]) == 0
    assert merge_on_disk(directory, out="exact") == 0
    assert merge_on_disk(directory, out="near", models=[{"model": f"q/{n}.safetensors"} for n in "ab"]) == 0
    exact, near, start = (open_checkpoint(directory / name) for name in ("exact", "near", "base"))
    for name in exact:
        if exact[name].is_floating_point():
            change = (exact[name] - start[name]).norm()
            assert (near[name] - exact[name]).norm() <= 0.02 * change, name


def test_bad_input(models, tmp_path):
    base, experts = models
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"x\.pt: a quantised task vector is a \.safetensors file"):
        quantize_expert(base, experts["x"], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="bits: expected one of"):
        quantize_expert(base, experts["x"], path, bits=5)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 8"):
        quantize_expert(base, experts["x"], path, group_size=7)
    with pytest.raises(CheckpointError, match=r"tensor 'a\.bias' holds 5 NaN"):
        quantize_expert(base, {**experts["x"], "a.bias": torch.full((5,), torch.nan)}, path)
    with pytest.raises(CheckpointError, match="lacks tensor"):
        quantize_expert(base, {n: t for n, t in experts["x"].items() if n != "a.bias"}, path)
    with pytest.raises(CheckpointError, match="'shared' is the name of the file"):
        quantize_experts(base, {"shared": experts["x"]}, tmp_path / "out")
    assert not files_in(tmp_path)

    quantize_expert(base, experts["x"], path)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_expert(base, experts["x"], path)
    with pytest.raises(CheckpointError, match="is a task vector from another base"):
        open_expert(path, experts["y"])
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["facts"])

    def rewritten(change=None, **facts_changed):
        save_file({**tensors, **(change or {})}, path, {**metadata, "facts": json.dumps({**facts, **facts_changed})})
        return open_expert(path, base)

    with pytest.raises(CheckpointError, match="its header describes no quantised task vector"):
        rewritten(shapes=None)
    with pytest.raises(CheckpointError, match=r"shares '\.\./x', which is not a file in the same directory"):
        rewritten(shared="../x")
    with pytest.raises(CheckpointError, match="no such file"):
        rewritten(shared="shared.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' is not as its header says"):
        rewritten({"a.weight.codes": tensors["a.weight.codes"][:-1].clone()})["a.weight"]


def test_several_experts_go_into_a_directory(tmp_path, capsys):
    for name in ("base", "x", "y"):
        save_state_dict({"w": torch.randn(4, 4)}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "x", "y")]
    assert main(["quantize", *paths, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "several experts go into one directory with --residual" in capsys.readouterr().err
