"""Several processes that do one merge together: the same bits as one, and a clear end when one of them dies."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from functools import cache

import pytest
from safetensors.torch import load_file, save_file

from statsmerge_ext.engine import processes
from tests import tiny_transformers
from tests.test_streamed import save_family, stream
from tests.tiny_models import write_recipe


@cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.process_group"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # its input ends, and so does it
    return server


def scenario(name: str, models) -> dict:
    """What comes out of a scenario of tests/process_group.py; all have one process that has imported the package."""
    print(json.dumps([name, str(models)]), file=_server().stdin, flush=True)
    facts = json.loads(_server().stdout.readline())
    assert facts is not None, "the scenario failed as said on stderr"
    return facts


def test_two_processes_write_what_one_writes(tmp_path):
    facts = scenario("same", save_family(tmp_path, rows=3000))
    assert facts == {merge: [[0, 0], True] for merge in ("ties", "dare_linear", "linear", "rules")}


def test_a_dry_run_of_several_processes_is_refused(tmp_path):
    facts = scenario("dry_run", save_family(tmp_path))
    for status, message in facts["results"]:
        assert status == 2 and message == "dry_run: says what one process needs; run it in one, without torchrun"
    assert facts["nothing_left"]


def assert_one_died(facts: dict) -> None:
    """The second of two processes was killed, and the first one has ended with a message that says so."""
    (leader, message), (other, _) = facts["results"]
    assert other == -9
    assert leader == 2 and "another process of this merge has ended" in message


def test_a_process_that_dies_ends_the_merge_and_leaves_a_journal(tmp_path):
    facts = scenario("death", save_family(tmp_path, rows=6000))
    assert_one_died(facts)
    assert "journal.1" in facts["journals"]
    assert facts["resumed"] <= facts["in_all"] - 3
    assert facts["same"]


def test_two_processes_share_samples(tmp_path):
    """Of a mixture, some of whose experts are called in one process only, block by block and in memory."""
    models = tiny_transformers.save_family(tmp_path, "qwen3 mixture", samples=60)
    cut = load_file(models / "b.safetensors")
    save_file({name: tensor[:40].clone() for name, tensor in cut.items()}, models / "b.safetensors")
    facts = scenario("samples", models)
    assert facts.keys() == {"lot-blocks", "regmean-blocks", "lot-memory.pt"}
    for statuses, apart in facts.values():
        assert statuses == [0, 0] and apart < 1e-5, facts


def test_a_process_that_dies_at_a_block_ends_the_merge_and_leaves_a_journal(tmp_path):
    facts = scenario("death_amid_blocks", tiny_transformers.save_family(tmp_path, "llama", samples=40))
    assert_one_died(facts)
    assert facts["journals"] == ["journal.0"]
    # The passes came to the embeddings and three blocks, of which the last was not added up.
    assert facts["written"] == ["model.layers.2", "model.norm", "lm_head", ""]


def test_a_process_that_dies_within_a_block_in_execution_order(tmp_path):
    facts = scenario("death_amid_layers", tiny_transformers.save_family(tmp_path, "llama", samples=40))
    assert_one_died(facts)
    assert facts["journals"] == ["journal.0"]
    # What belongs to no block, the embeddings and the first block were on the disk.
    left = ["model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    assert facts["merged"] == [[0, left], [0, left]]
    assert facts["same"]


def test_statistics_and_spread_tensors(tmp_path):
    facts = scenario("states", save_family(tmp_path))
    assert facts["statistics"] == [facts["one"], facts["one"]]
    assert facts["spread"] == [[0, True], [0, True]]


def test_the_command_line_under_torchrun(tmp_path):
    models = save_family(tmp_path)
    recipe = write_recipe(models, "ties", parameters={"density": 0.3})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    merge = ["-m", "statsmerge_ext", "merge", str(recipe), str(models / "two")]
    done = subprocess.run([*command, *merge], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    stream(models, "one", method="ties", parameters={"density": 0.3})
    assert (models / "two" / "model.safetensors").read_bytes() == (models / "one" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[5, 1, 1, 1, 1, 1], [1], [0, 0], [], [3] * 20])
def test_shares_cover_everything_once(monkeypatch, count, sizes):
    monkeypatch.setattr(processes, "count", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(list(range(len(sizes))), sizes))
    assert sum(shares, []) == list(range(len(sizes)))
    if len(sizes) == 20:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
