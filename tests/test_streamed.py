"""Streamed merges: the same bits as in memory, whatever the budget, and after any interruption."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import statsmerge_ext
from statsmerge_ext import LayerRule, estimates, output, run, run_merge
from statsmerge_ext.checkpoints import file_formats, open_checkpoint, weight_files
from statsmerge_ext.checkpoints.header import read_header
from statsmerge_ext.checkpoints.partial import PartialOutput
from statsmerge_ext.engine import streaming
from statsmerge_ext.errors import CheckpointError, MethodError
from tests.tiny_models import files_in, write_recipe

METHODS = {
    "linear": {"weights": [0.3, 0.9], "normalize": False},
    "task_arithmetic": {"scaling_factor": 0.4},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4, "normalize": True},
    "layer_wise_anchor": {"ramp": "cosine"},
}


@pytest.fixture
def models(tmp_path) -> Path:
    return save_family(tmp_path)


def save_family(directory: Path, rows: int = 900) -> Path:
    """Base, "a" and "b" in mixed dtypes, tensors larger and smaller than a block, a BatchNorm's buffers, integers."""
    generator = torch.Generator().manual_seed(0)

    def state(noise: float) -> dict[str, torch.Tensor]:
        base = torch.Generator().manual_seed(1)
        shapes = {"big": (rows, 100), "flat": (rows * 50,), "norm.weight": (7,), "empty": (0, 4), "scalar": ()}
        tensors = {
            name: torch.randn(shape, generator=base) + noise * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        tensors["big"] = tensors["big"].bfloat16()
        tensors["double"] = torch.randn(40, 3, generator=base).double() * (1 + noise)
        tensors["bn.running_mean"] = torch.ones(5) * noise
        return {**tensors, "bn.num_batches_tracked": torch.tensor(3), "mask": torch.tensor([True, False])}

    for name, noise in (("base", 0.0), ("a", 0.1), ("b", 0.05)):
        (directory / name).mkdir()
        save_file(state(noise), directory / name / "model.safetensors")
        (directory / name / "config.json").write_text('{"model_type": "bert"}')
    return directory


def stream(models: Path, out: str = "out", method: str = "task_arithmetic", **options) -> dict:
    parameters = options.pop("parameters", METHODS.get(method, {}))
    recipe = write_recipe(models, method, parameters=parameters, layers=options.pop("layers", None))
    return run_merge(recipe, models / out, progress=False, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [None, 12 * 65536 * 32])
def test_the_same_bits_as_in_memory(models, monkeypatch, method, budget):
    in_memory = {name: dict(open_checkpoint(models / name)) for name in ("base", "a", "b")}
    base = in_memory.pop("base")
    expected = statsmerge_ext.merge(method, base=base, experts=in_memory, **METHODS[method]).state
    stream(models, method=method, memory_budget=budget, out_shard_size="100KB")
    written = open_checkpoint(models / "out")
    assert len(list((models / "out").glob("*.safetensors"))) > 2
    assert set(written) == set(base)
    for name in base:
        assert written.dtype(name) == base[name].dtype
        assert torch.equal(written[name], expected[name]), name
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    assert not (models / "out.partial").exists()


RULES = [
    {"filter": "big", "merge_method": "ties", "parameters": {"density": 0.3}},
    {"filter": "flat", "merge_method": "dare_linear", "parameters": {"density": 0.4}},
    {"filter": "double", "merge_method": "iso_c"},
    {"filter": "norm", "merge_method": "keep"},
]


@pytest.mark.parametrize("budget", [None, 12 * 65536 * 32])
def test_layers_that_go_by_methods_of_their_own(models, monkeypatch, budget):
    """Whole layers, elements and the base itself in one stream, also after an interruption; and its dry run."""
    in_memory = {name: dict(open_checkpoint(models / name)) for name in ("base", "a", "b")}
    base = in_memory.pop("base")
    rules = [LayerRule(r["filter"], r["merge_method"], r.get("parameters", {})) for r in RULES]
    general = METHODS["task_arithmetic"]
    expected = statsmerge_ext.merge("task_arithmetic", base=base, experts=in_memory, layers=rules, **general)
    options = {"layers": RULES, "memory_budget": budget}
    assert stream(models, dry_run=True, **options)["plan"]["tensors"] == len(base)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(models, **options)
    monkeypatch.setattr(streaming, "_LONGEST", streaming.BLOCK)
    with pytest.raises(CheckpointError, match="is the journal of another run"):
        stream(models, layers=RULES[:2], memory_budget=budget)
    report = stream(models, **options)
    written = open_checkpoint(models / "out")
    for name in base:
        assert torch.equal(written[name], expected.state[name]), name
    assert torch.equal(written["norm.weight"], base["norm.weight"])
    assert report["rules"] == expected.report["rules"]
    assert [rule["layers"] for rule in report["rules"]] == [["big"], ["flat"], ["double"], ["norm.weight"]]
    assert "| layers with 'big' | ties: density 0.3 |" in (models / "out" / "README.md").read_text()
    coefficients = json.loads((models / "out" / "coefficients.json").read_text())
    rows = dict(zip(coefficients["names"], coefficients["values"], strict=True))
    assert rows["norm.weight"] == [0, 0] and rows["scalar"] == [0.4, 0.4] and rows["flat"] == [0.5, 0.5]


def test_a_rule_that_fits_no_tensor_is_refused(models):
    for dry_run in (False, True):
        with pytest.raises(MethodError, match=r"layers\[0\]: filter 'nrom' .* \(did you mean 'norm'\?\)"):
            stream(models, layers=[{"filter": "nrom", "merge_method": "keep"}], dry_run=dry_run)
    assert "out.partial" not in files_in(models)


def test_a_method_of_whole_layers_is_streamed_too(models):
    from statsmerge_ext.methods import registry

    shapes = {}

    @registry.register_method("whole")
    def whole(problem):
        def merge(layer, base, task_vectors):
            shapes[layer.name] = base.shape
            return base + task_vectors[0] / (1 + task_vectors[1].norm())

        return problem.map_layers(merge)

    try:
        stream(models, method="whole")
        written, base = open_checkpoint(models / "out"), open_checkpoint(models / "base")
        a, b = open_checkpoint(models / "a"), open_checkpoint(models / "b")
        assert shapes == {name: base.shape(name) for name in shapes} and len(shapes) == 6
        expected = base["flat"] + (a["flat"] - base["flat"]) / (1 + (b["flat"] - base["flat"]).norm())
        torch.testing.assert_close(written["flat"], expected)
        with pytest.raises(MethodError, match=r"memory_budget: 1000000 bytes are too few; \d+ are needed for 90000"):
            stream(models, "other", method="whole", memory_budget="1MB")
    finally:
        del registry._methods["whole"]


def test_a_budget_that_is_too_small_is_refused(models):
    with pytest.raises(MethodError, match="memory_budget: 5000 bytes are too few"):
        stream(models, memory_budget="5KB")
    with pytest.raises(CheckpointError, match="memory budget: got 'much'"):
        stream(models, memory_budget="much")
    assert "out.partial" not in files_in(models)


PEAK = """
import resource, sys
from statsmerge_ext import run_merge
from statsmerge_ext.memory import keep_freed_memory

keep_freed_memory()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_merge(sys.argv[1], sys.argv[2], progress=False)  # of a tiny model: what is loaded for any merge is there
before = peak()
run_merge(sys.argv[3], sys.argv[4], progress=False, memory_budget="24MiB")
print(1024 * (peak() - before))
"""


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_memory_is_bounded_by_the_budget(tmp_path, method):
    """Models and result of 250 MB pass through a budget of 24 MiB."""
    commands = []
    for name, count in (("tiny", 1000), ("large", 16_000_000)):
        base = torch.randn(count, generator=torch.Generator().manual_seed(0))
        (tmp_path / name).mkdir()
        for model in ("base", "a", "b"):
            (tmp_path / name / model).mkdir()
            state = {"w": base + 0.1 * len(model), "v": base[:100].clone()}
            save_file(state, tmp_path / name / model / "model.safetensors")
        commands += [str(write_recipe(tmp_path / name, method)), str(tmp_path / name / "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *commands], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Blocks of intermediate results, histograms and the allocator's slack are not the models' and not counted.
    assert int(done.stdout) < 80e6


def test_a_file_cut_short_while_it_is_read_is_an_error(models, monkeypatch):
    opened = open_checkpoint(models / "a")
    content = (models / "a" / "model.safetensors").read_bytes()
    (models / "a" / "model.safetensors").write_bytes(content[:-200_000])
    with pytest.raises(CheckpointError, match="the file was cut short while it was read"):
        for name in opened:
            opened.run(name, 0, opened.shape(name).numel())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice about its page cache")
@pytest.mark.parametrize("fits", [True, False])
def test_models_that_do_not_fit_into_the_page_cache_do_not_stay_there(models, monkeypatch, fits):
    size = stream(models, "expected.safetensors")["plan"]["bytes"]
    dropped: dict[int, set[int]] = {}

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert length  # 0 would be all of the file
        dropped.setdefault(os.fstat(descriptor).st_ino, set()).update(range(start, start + length))

    behind = 1000
    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(file_formats, "_DROPPED_BEHIND", behind)
    monkeypatch.setattr(weight_files, "_WRITTEN_OUT", behind)
    monkeypatch.setattr(run, "can_hold", lambda needed: fits if needed > 3 * size else pytest.fail("not all files"))
    stream(models, "out.safetensors")
    out = models / "out.safetensors"
    expected, merged = open_checkpoint(models / "expected.safetensors"), open_checkpoint(out)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    for file in (*(models / name / "model.safetensors" for name in ("base", "a", "b")), out):
        for key in ("big", "flat"):
            info = read_header(file)[0][key]
            expected = set(range(info.offset, info.offset + info.nbytes - behind))
            assert (
                expected.isdisjoint(dropped.get(file.stat().st_ino, set()))
                if fits
                else (expected <= dropped[file.stat().st_ino])
            )


def test_a_single_file_carries_the_recipe(models):
    stream(models, "out.safetensors")
    assert json.loads(open_checkpoint(models / "out.safetensors").metadata["merge_report.json"])["experts"] == [
        "a",
        "b",
    ]


# Interruptions


def test_killed_at_random_moments_the_same_command_ends_in_the_same_files(tmp_path):
    """SIGKILL from outside at random moments, and just before random changes of files, fifty times in all."""
    models = save_family(tmp_path, rows=1200)
    recipe = write_recipe(models, "dare_linear", parameters=METHODS["dare_linear"])
    command = [sys.executable, "-m", "tests.kill_merges", str(recipe), str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["differing"] == []
    assert facts["killed"] >= 50
    assert facts["resumed"] >= 10


def interrupted_after(monkeypatch, pieces: int, error: BaseException) -> None:
    """Have the next merge fail when it has written so many pieces, all of them in its journal."""
    save, left = output._Saver.save_if_due, [pieces]

    def save_and_fail(self, state):
        save(self, state)
        if self._running:
            self._running.result()
        left[0] -= 1
        if not left[0]:
            raise error

    monkeypatch.setattr(output, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(streaming, "_LONGEST", streaming.BLOCK)
    monkeypatch.setattr(output._Saver, "save_if_due", save_and_fail)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_costs_only_what_was_not_done(models, monkeypatch, error):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3, error)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            stream(models)
        if isinstance(error, OSError):
            assert "what is done is kept in out.partial" in str(caught.value)
    assert not (models / "out").exists()

    computed = []
    merged = streaming.Stream.results
    monkeypatch.setattr(streaming, "_LONGEST", streaming.BLOCK)
    monkeypatch.setattr(streaming.Stream, "results", lambda *a: (computed.append(r[0]) or r for r in merged(*a)))
    stream(models)
    in_all = len(computed)
    computed.clear()
    stream(models, "undisturbed")
    assert len(computed) == in_all + 3
    for file in (models / "undisturbed").glob("*.safetensors"):
        assert (models / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_another_merge_has_left_is_not_gone_on_with(models, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(models)
        left = files_in(models / "out.partial")
        with pytest.raises(CheckpointError, match="is the journal of another run .* without resuming"):
            stream(models, random_seed=1)
        assert files_in(models / "out.partial") == left
    stream(models, random_seed=1, resume=False)
    assert not (models / "out.partial").exists()


def test_two_merges_do_not_write_the_same_output(models):
    with PartialOutput(models / "out", resume=True):
        with pytest.raises(CheckpointError, match="another process is writing it"):
            stream(models)
    stream(models)


def test_an_error_leaves_nothing(models):
    state = dict(open_checkpoint(models / "b"))
    state["flat"][-1] = float("nan")
    save_file(state, models / "b" / "model.safetensors")
    before = files_in(models)
    with pytest.raises(CheckpointError, match="tensor 'flat' holds 1 NaN"):
        stream(models)
    assert files_in(models) == sorted([*before, "recipe.yaml"])


def test_a_tied_tensor_that_an_expert_has_once(models):
    """Merged under both names, also in the sample of a dry run."""
    state = dict(open_checkpoint(models / "base"))
    save_file({**state, "again": state["flat"].clone()}, models / "base" / "model.safetensors")
    plan = stream(models, dry_run=True)["plan"]
    stream(models)
    written = open_checkpoint(models / "out")
    assert plan["tensors"] == len(written)
    assert torch.equal(written["again"], written["flat"])


def test_a_dry_run_says_what_the_merge_will_take(models):
    """Of these models the sample is all there is: bytes have to be exact, and seconds differ by what disturbs them."""
    plan = stream(models, method="ties", dry_run=True)["plan"]
    assert "out.partial" not in files_in(models) and "out" not in files_in(models)
    began = time.perf_counter()
    stream(models, method="ties")
    seconds = time.perf_counter() - began
    written, inputs = open_checkpoint(models / "out"), [open_checkpoint(models / name) for name in ("base", "a", "b")]
    assert plan["tensors"] == len(written)
    assert plan["bytes"] == sum(tensor.nbytes for tensor in written.values())
    floating = [tensor for state in inputs for tensor in state.values() if tensor.is_floating_point()]
    assert plan["bytes_read"] == sum(tensor.nbytes for tensor in floating)
    assert seconds / 5 < plan["seconds"] < 5 * seconds
    assert plan["memory"] == pytest.approx(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.25)


def test_seconds_are_those_of_samples_by_their_bytes(models, monkeypatch):
    """What only the first sample takes is counted once, and what its bytes take as often as there are more of them."""
    clock, sizes = [0.0], []

    def write(solved, out, infos, identity, **writing):
        sizes.append(sum(info.nbytes for info in infos.values()))
        clock[0] += 100.0 * (len(sizes) == 1) + 1e-3 * sizes[-1]

    monkeypatch.setattr(estimates, "write_streamed", write)
    monkeypatch.setattr(estimates, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(estimates, "_SAMPLE_SHARE", 0.0)
    for enough in (10, 10**9):
        clock[0] = 0.0
        sizes.clear()
        monkeypatch.setattr(estimates, "_SAMPLE_BYTES", enough)
        plan = stream(models, dry_run=True)["plan"]
        of_all = plan["bytes_read"] / 3
        assert sum(sizes) == of_all if enough > of_all else sum(sizes) < of_all
        assert plan["seconds"] == pytest.approx(100 + 1e-3 * of_all, rel=0.01)
