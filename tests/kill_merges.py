"""Kill a merge again and again, and see that the same command always ends in the same files.

``python kill_merges.py RECIPE DIRECTORY KILLS`` prints as JSON how many processes were killed, how many took up what
another had left, and the outputs that differ from one that nobody disturbed. It forks instead of starting every process
anew, so that hundreds of kills take seconds; nothing but imports runs before a fork, also of what merges of models
need, and what transformers builds when it is asked for the names of a model's tensors for the first time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from transformers import AutoConfig, LlamaForCausalLM  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from statsmerge_ext import output, run_merge
from statsmerge_ext.engine import streaming

#: What changes files; a process that kills itself does so just before one of these.
STEPS = [(os, "pwrite"), (os, "fsync"), (os, "replace"), (os, "posix_fallocate"), (shutil, "rmtree"), (os, "unlink")]


def merge(
    recipe: Path, out: Path, seconds: float | None = None, step: int | None = None, count: Path | None = None
) -> bool:
    """Merge in a child process that is killed after ``seconds``, or kills itself before its ``step``-th change of a
    file; into ``count`` it writes how many there were. Returns whether it came to its end."""
    child = os.fork()
    if not child:
        status = 1
        try:
            left = _die_before(step or 10**9)
            run_merge(recipe, out, progress=False, out_shard_size="100KB", overwrite=True)
            if count is not None:
                count.write_text(str(10**9 - left[0]))
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a merge failed")
    return os.WIFEXITED(status)


def _die_before(step: int) -> list[int]:
    """Die so; gives a list with the number of changes that are left until then."""
    left = [step]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.fsync = lambda descriptor: None  # a process that is killed loses nothing it has written; syncing takes time
    for module, name in STEPS:
        setattr(module, name, counted(getattr(module, name)))
    return left


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors*")}


def main(recipe: Path, directory: Path, kills: int) -> dict:
    output._SECONDS_BETWEEN_SAVES = 0.0
    streaming._LONGEST = streaming.BLOCK
    moments = random.Random(0)
    get_checkpoint_conversion_mapping("llama")
    began = time.perf_counter()
    merge(recipe, directory / "undisturbed", count=directory / "steps")
    duration, steps = time.perf_counter() - began, int((directory / "steps").read_text())
    expected = contents(directory / "undisturbed")

    killed, resumed, differing = 0, 0, []
    for number in range(10**6):
        if killed >= kills:
            break
        out, ended = directory / f"out{number}", False
        while not ended:
            resumed += any(out.with_name(f"{out.name}.partial").glob("journal.*"))
            if killed % 2:
                ended = merge(recipe, out, seconds=moments.uniform(0, duration))
            else:
                ended = merge(recipe, out, step=moments.randint(1, steps))
            killed += not ended
        if contents(out) != expected or out.with_name(f"{out.name}.partial").exists():
            differing.append(out.name)
        shutil.rmtree(out)
    return {"killed": killed, "resumed": resumed, "outputs": number, "differing": differing}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
