"""Merges by two processes: ``python -m tests.process_group`` reads lines of JSON, [scenario, directory], and answers
each with a line that says what came out, or null.

The processes are forked from one that has imported the package and computed nothing, and meet as those of torchrun do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM, Qwen3MoeForCausalLM  # noqa: F401  imported before any fork

import statsmerge_ext
from statsmerge_ext import blockwise, output, run_merge
from statsmerge_ext.checkpoints import open_checkpoint
from statsmerge_ext.engine import block_evidence, block_order, processes, streaming
from statsmerge_ext.errors import ProcessError
from statsmerge_ext.evidence.statistics import collect_weight_statistics
from statsmerge_ext.layers import layers_of_state
from tests.tiny_models import write_recipe


def in_two_processes(function: Callable[[], object]) -> list[tuple[int, object]]:
    """(exit status or minus the signal, JSON-able result or None) of a function that both call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in group.items()})
                torch.set_num_threads(1)
                with processes.joined():
                    os.write(write, json.dumps(function()).encode())
                status = 0
            except ProcessError as error:
                os.write(write, json.dumps(str(error)).encode())
                status = 2
            finally:
                os._exit(status)
        os.close(write)
        children.append((child, read))
    results = []
    for child, read in children:
        with open(read) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        results.append((status, json.loads(text) if text else None))
    return results


def merging(
    models: Path, out: str, method: str, parameters: dict, layers: list | None = None, **options
) -> Callable[[], object]:
    recipe = write_recipe(models, method, parameters=parameters, layers=layers)
    return lambda: run_merge(recipe, models / out, progress=False, out_shard_size="100KB", **options)["method"]


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors*")}


def same(models: Path) -> dict:
    """Whether two processes write what one writes, and take shares of it."""
    facts = {}
    rules = [
        {"filter": "flat", "merge_method": "ties", "parameters": {"density": 0.3}},
        {"filter": "double", "merge_method": "iso_c"},
        {"filter": "norm", "merge_method": "keep"},
    ]
    merges = {
        "ties": ("ties", {"density": 0.3}),
        "dare_linear": ("dare_linear", {"density": 0.4}),
        "linear": ("linear", {}),
        "rules": ("task_arithmetic", {}, rules),
    }
    for name, merge in merges.items():
        results = in_two_processes(merging(models, f"two-{name}", *merge))
        one = in_two_processes(lambda: None) and os.fork()
        if not one:  # in a child too: a process that has computed with several threads must not be forked again
            merging(models, f"one-{name}", *merge)()
            os._exit(0)
        os.waitpid(one, 0)
        facts[name] = (
            [status for status, _ in results],
            weights(models / f"two-{name}") == weights(models / f"one-{name}"),
        )
    return facts


def dry_run(models: Path) -> dict:
    """What two processes say of a merge that they shall only estimate, and what is left of it."""
    before = sorted(path.name for path in models.iterdir())
    results = in_two_processes(merging(models, "out", "linear", {}, dry_run=True))
    after = sorted(path.name for path in models.iterdir() if path.name != "recipe.yaml")
    return {"results": results, "nothing_left": before == after}


def death(models: Path) -> dict:
    """One process dies in the middle: the other says so, and one process alone goes on with what both have done."""
    merge = merging(models, "out", "task_arithmetic", {})

    def dying() -> object:
        if dist.get_rank() == 1:
            save, left = output._Saver.save_if_due, [3]

            def save_and_die(self, state):
                save(self, state)
                if self._running:
                    self._running.result()
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            output._Saver.save_if_due = save_and_die
        return merge()

    results = in_two_processes(dying)
    journals = sorted(path.name for path in (models / "out.partial").glob("journal.*"))
    computed = []
    work = streaming.Stream.results
    streaming.Stream.results = lambda *a: (computed.append(1) or result for result in work(*a))
    merge()
    resumed = len(computed)
    merging(models, "one", "task_arithmetic", {})()
    return {
        "results": results,
        "journals": journals,
        "resumed": resumed,
        "in_all": len(computed) - resumed,
        "same": weights(models / "out") == weights(models / "one"),
    }


def with_samples(models: Path, method: str, out: str, layers=None, **parameters) -> Callable[[], object]:
    """A merge that looks at samples, in batches of 20."""
    calibration = {"data": {name: f"{name}.safetensors" for name in ("a", "b")}, "batch_size": 20}
    recipe = write_recipe(models, method, calibration=calibration, parameters=parameters, layers=layers)
    transformers.utils.logging.disable_progress_bar()
    return lambda: run_merge(recipe, models / out, progress=False)["method"]


def samples(models: Path) -> dict:
    """How far what two processes make of their shares is from what one makes of all samples."""
    return shares(models, ("lot", "blocks"), ("regmean", "blocks"), ("lot", "memory.pt"))


def samples_in_order(models: Path) -> dict:
    """The same of a merge in execution order, with ridges that hardly amplify the rounding of sums."""
    cases = ("drift_compensation", "blocks"), ("drift_compensation", "memory.pt")
    return shares(models, *cases, ridge=0.1, drift_ridge=1.0)


def rules_in_order(models: Path) -> dict:
    """As :func:`samples_in_order`, with a block and a part of each block that go by other methods."""
    rules = ("layers.0.", "keep"), ("down_proj", "tsv_m"), ("lm_head", "linear")
    layers = [{"filter": part, "merge_method": method} for part, method in rules]
    cases = ("drift_compensation", "blocks"), ("drift_compensation", "memory.pt")
    return shares(models, *cases, layers=layers, ridge=0.1, drift_ridge=1.0)


def shares(models: Path, *cases: tuple[str, str], **parameters) -> dict:
    facts = {}
    for method, out in cases:
        name = f"{method}-{out}"
        results = in_two_processes(with_samples(models, method, f"two-{name}", **parameters))
        with_samples(models, method, f"one-{name}", **parameters)()
        two, one = (open_checkpoint(models / f"{count}-{name}") for count in ("two", "one"))
        apart = max(float((two[key] - one[key]).abs().max() / one[key].abs().max()) for key in one if one[key].any())
        facts[name] = [[status for status, _ in results], apart]
    return facts


def death_amid_blocks(models: Path) -> dict:
    """One process dies at a block: the other says so, and one alone goes on behind the last block on the disk."""

    def die_soon() -> None:
        go_on, left = block_evidence.GramSweep._go_on, [5]

        def die(self, *arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return go_on(self, *arguments, **options)

        block_evidence.GramSweep._go_on = die

    merge = with_samples(models, "lot", "out")
    facts = death_of_one(models, merge, die_soon)
    return {**facts, "written": blocks_merged(merge)}


def death_amid_layers(models: Path) -> dict:
    """One process dies within a block in execution order: the other says so, and the two go on with the same result."""

    def die_soon() -> None:
        rounded = block_order.OrderedSweep.rounded

        def die(self, key, merged):
            if key == "model.layers.1.mlp.gate_proj.weight":
                os.kill(os.getpid(), signal.SIGKILL)
            return rounded(self, key, merged)

        block_order.OrderedSweep.rounded = die

    in_two_processes(with_samples(models, "drift_compensation", "undisturbed"))
    merge = with_samples(models, "drift_compensation", "out")
    facts = death_of_one(models, merge, die_soon)
    merged = in_two_processes(lambda: blocks_merged(merge))
    return {**facts, "merged": merged, "same": weights(models / "out") == weights(models / "undisturbed")}


def death_of_one(models: Path, merge: Callable[[], object], die_soon: Callable[[], None]) -> dict:
    """What becomes of a merge whose second process dies as ``die_soon`` makes it, and the first saves every block."""

    def dying() -> object:
        if dist.get_rank() == 1:
            die_soon()
        else:
            save = output._Saver.save_if_due
            output._Saver.save_if_due = lambda self, state: (save(self, state), self._running.result())
        return merge()

    results = in_two_processes(dying)
    return {"results": results, "journals": sorted(path.name for path in (models / "out.partial").glob("journal.*"))}


def blocks_merged(merge: Callable[[], object]) -> list[str]:
    """The blocks that ``merge`` still has to merge."""
    merged = []
    merge_block = blockwise.BlockMerge._merge_block
    blockwise.BlockMerge._merge_block = lambda *a: (merged.append(a[1].path), merge_block(*a)) and None
    merge()
    return merged


def states(models: Path) -> dict:
    """Statistics by two processes, and a merge of state dicts whose tensors are spread over them."""

    def statistics() -> object:
        base, a, b = (open_checkpoint(models / name) for name in ("base", "a", "b"))
        found = collect_weight_statistics(layers_of_state(base), base, {"a": a, "b": b}, of="task_vectors")
        return found.values.tolist()

    def spread() -> object:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        plain = {name: load_file(models / name / "model.safetensors") for name in ("base", "a", "b")}
        plain = {name: {key: state[key] for key in ("big", "flat")} for name, state in plain.items()}
        sharded = {
            name: {key: distribute_tensor(tensor, mesh, [Shard(0)]) for key, tensor in state.items()}
            for name, state in plain.items()
        }
        results = [
            statsmerge_ext.merge("ties", base=models.pop("base"), experts=models, density=0.3).state
            for models in (sharded, plain)
        ]
        return all(torch.equal(results[0][key], results[1][key]) for key in results[1])

    of_two, of_spread = in_two_processes(statistics), in_two_processes(spread)
    return {"statistics": [found for _, found in of_two], "one": statistics(), "spread": of_spread}


SCENARIOS = (
    same,
    dry_run,
    death,
    samples,
    samples_in_order,
    rules_in_order,
    death_amid_blocks,
    death_amid_layers,
    states,
)


def answer(name: str, directory: str) -> str:
    """What a scenario gives, as JSON, in a process of its own: a scenario may leave anything changed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with open(write, "w") as pipe:
                json.dump({each.__name__: each for each in SCENARIOS}[name](Path(directory)), pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text or "null"


if __name__ == "__main__":
    output._SECONDS_BETWEEN_SAVES = 0.0
    streaming._LONGEST = streaming.BLOCK
    torch.set_num_threads(1)  # a process that has computed with several must not be forked
    for line in sys.stdin:
        print(answer(*json.loads(line)), flush=True)
