"""Merges of a Llama-shaped model of 3 billion parameters on disk, beside copying the same bytes, and mergekit.

    python benchmarks/streaming.py make DIR [--billions B]   # a base and three experts, bfloat16: 8 B GB in all
    python benchmarks/streaming.py copy DIR [--drop]          # read all inputs and write as much as a merge does
    python benchmarks/streaming.py merge DIR METHOD           # the whole command, in a process of its own
    python benchmarks/streaming.py plan DIR METHOD            # what the command says before that it will take
    python benchmarks/streaming.py mergekit DIR METHOD        # the same recipe by mergekit's command, if installed
    python benchmarks/streaming.py compare DIR                # the merged weights of both, element by element

METHOD is one that looks at weights alone, or lot, regmean or drift_compensation, which go block by block with 8 samples
of 256 random tokens an expert. Each prints one line of JSON: seconds, bytes read and written, largest resident size.
The inputs are dropped from the page cache before each, so that all of them read from the disk; what is written is
synced before the clock stops. Each begins some seconds after that: a virtual machine gives freed memory back to its
host only then, and takes it again at 1.6 s a GB here, which some would pay for and others not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from statsmerge_ext import run_merge
from statsmerge_ext.checkpoints import open_checkpoint, page_cache
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.weight_files import ShardedWeights

EXPERTS = ("one", "two", "three")
RECIPES = {
    "linear": {"parameters": {"normalize": True}, "each": {"weight": 1.0}},
    "task_arithmetic": {"parameters": {}, "each": {"weight": 0.4}},
    "ties": {"parameters": {"normalize": True, "scope": "layer"}, "each": {"weight": 1.0, "density": 0.25}},
    "lot": {"parameters": {}, "each": {}},
    "regmean": {"parameters": {}, "each": {}},
    "drift_compensation": {"parameters": {}, "each": {}},
}
WITH_DATA = ("lot", "regmean", "drift_compensation")
SAMPLES, TOKENS = 8, 256
HIDDEN, INNER, KEYS, VOCABULARY = 3072, 8192, 1024, 32000
SETTLING = 5.0  # seconds
_CHUNK = 2**23


def shapes(billions: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of that many parameters."""
    per_layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER + 2 * HIDDEN
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(max(1, round((billions * 1e9 - 2 * VOCABULARY * HIDDEN) / per_layer))):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KEYS, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KEYS, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "mlp.gate_proj.weight", (INNER, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INNER, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INNER)
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make(directory: Path, billions: float) -> None:
    """Weights of size 0.02, and experts that differ from them by a tenth of that, drawn again and again from a pool."""
    infos = {name: TensorInfo(torch.Size(shape), torch.bfloat16) for name, shape in shapes(billions)}
    layers = sum("q_proj" in name for name in infos)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 128,
        "num_key_value_heads": KEYS // 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for number, model in enumerate(("base", *EXPERTS)):
        (directory / model).mkdir(parents=True)
        (directory / model / "config.json").write_text(json.dumps(config))
        files = ShardedWeights(directory / model, infos, 5 * 10**9)
        base = torch.randn(_CHUNK + 10007, generator=torch.Generator().manual_seed(0)) * 0.02
        noise = torch.randn(_CHUNK + 20011, generator=torch.Generator().manual_seed(number)) * (0.002 * bool(number))
        for place, name in enumerate(files.names):
            count = infos[name].shape.numel()
            for first in range(0, count, _CHUNK):
                length = min(_CHUNK, count - first)
                shift, other = (place * 613 + first) % 10007, (place * 911 + first) % 20011
                values = base[shift : shift + length] + noise[other : other + length]
                files.write(name, values.bfloat16(), first)
        files.sync()
        files.close()


def inputs(directory: Path) -> list[Path]:
    return [file for model in ("base", *EXPERTS) for file in sorted((directory / model).glob("*.safetensors"))]


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(directory: Path, *, drop: bool) -> None:
    """Read all inputs, in turns as a merge does, and write the bytes of the base; with ``drop``, have all of it leave
    the page cache on the way, as a merge does that does not fit there."""
    buffer = memoryview(bytearray(2**22))
    columns = [sorted((directory / model).glob("*.safetensors")) for model in ("base", *EXPERTS)]
    for number, shards in enumerate(zip(*columns, strict=True)):
        opened = [open(path, "rb", buffering=0) for path in shards]
        with open(directory / f"copy-{number}", "wb", buffering=0) as out:
            while count := opened[0].readinto(buffer):
                out.write(buffer[:count])
                for other in opened[1:]:
                    other.readinto(buffer)
                if drop:
                    for file, behind in ((out, 2**28), *((file, 2**23) for file in opened)):
                        page_cache.drop(file.fileno(), file.tell() - behind, file.tell())
            os.fsync(out.fileno())
    for path in directory.glob("copy-*"):
        path.unlink()


def write_recipe(directory: Path, method: str, dtype: str) -> Path:
    parameters = RECIPES[method]
    models = [{"model": str(directory / name), "parameters": parameters["each"]} for name in EXPERTS]
    recipe = {"merge_method": method, "models": models, "parameters": parameters["parameters"]}
    recipe |= {"dtype": dtype, "out_dtype": "bfloat16"}
    if method in WITH_DATA:
        recipe["calibration"] = {"data": {name: str(write_samples(directory, name)) for name in EXPERTS}}
    if method != "linear":
        recipe["base_model"] = str(directory / "base")
    path = directory / f"{method}.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def write_samples(directory: Path, expert: str) -> Path:
    """Random tokens of a vocabulary that is the expert's own third of all."""
    part = VOCABULARY // len(EXPERTS)
    generator = torch.Generator().manual_seed(EXPERTS.index(expert))
    tokens = torch.randint(part, (SAMPLES, TOKENS), generator=generator) + part * EXPERTS.index(expert)
    path = directory / f"samples-{expert}.safetensors"
    save_file({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, path)
    return path


def run(command: list[str], out: Path) -> float:
    """Seconds of a command that makes a directory, until that is on the disk."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    for path in out.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def compare(directory: Path, method: str) -> dict:
    """How far the two outputs are apart, in steps of bfloat16 at the largest of the two values and the base's."""
    ours, theirs = (open_checkpoint(directory / f"{kind}-{method}") for kind in ("merge", "mergekit"))
    base = open_checkpoint(directory / "base")
    steps = [0, 0, 0]  # the same; by one step at most; by more
    for name in ours:
        for first in range(0, ours.shape(name).numel(), _CHUNK):
            last = min(first + _CHUNK, ours.shape(name).numel())
            a, b, start = (state.run(name, first, last).float() for state in (ours, theirs, base))
            step = torch.maximum(torch.maximum(a.abs(), b.abs()), start.abs()) * 2.0**-7
            apart = (a - b).abs()
            same, near = int((apart == 0).sum()), int((apart <= step).sum())
            for place, count in enumerate((same, near - same, len(a) - near)):
                steps[place] += count
    return dict(zip(("same", "one_step", "more"), (count / sum(steps) for count in steps), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("make", "copy", "merge", "plan", "mergekit", "compare"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("method", nargs="?", choices=RECIPES)
    parser.add_argument("--billions", type=float, default=3.0)
    parser.add_argument("--warm", action="store_true", help="leave the inputs in the page cache")
    parser.add_argument("--drop", action="store_true", help="of copy: have files leave the page cache on the way")
    parser.add_argument("--dtype", default="bfloat16", help="what mergekit computes in; we always do in float32")
    options = parser.parse_args()
    if options.action == "make":
        return make(options.directory, options.billions)
    if options.action == "compare":
        return print(json.dumps(compare(options.directory, options.method)))
    files = inputs(options.directory)
    facts = {"action": options.action, "method": options.method, "gigabytes_read": sum(f.stat().st_size for f in files)}
    facts["gigabytes_read"] /= 1e9
    shutil.rmtree(options.directory / f"{options.action}-{options.method}", ignore_errors=True)
    if not options.warm:
        forget(files)
    time.sleep(SETTLING)
    if options.action == "plan":
        recipe = write_recipe(options.directory, options.method, options.dtype)
        loading, began = time.process_time(), time.perf_counter()
        plan = run_merge(recipe, options.directory / "merge-plan", dry_run=True, progress=False)["plan"]
        plan["seconds"] += loading  # as the command says it
        return print(json.dumps({**facts, "took": round(time.perf_counter() - began, 2), "plan": plan}))
    if options.action == "copy":
        began = time.perf_counter()
        copy(options.directory, drop=options.drop)
        seconds = time.perf_counter() - began
    else:
        recipe, out = (
            write_recipe(options.directory, options.method, options.dtype),
            options.directory / f"{options.action}-{options.method}",
        )
        program = {
            "merge": [sys.executable, "-m", "statsmerge_ext", "merge", str(recipe), str(out), "--quiet", "--no-resume"],
            "mergekit": [os.environ.get("MERGEKIT", "mergekit-yaml"), str(recipe), str(out), "--no-copy-tokenizer"],
        }
        seconds = run(program[options.action], out)
    facts |= {"seconds": round(seconds, 2), "gigabytes_per_second": round(facts["gigabytes_read"] / seconds, 3)}
    used = resource.getrusage(resource.RUSAGE_CHILDREN if options.action != "copy" else resource.RUSAGE_SELF)
    facts["cpu_seconds"] = {"user": round(used.ru_utime, 1), "system": round(used.ru_stime, 1)}
    facts["peak_megabytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
