"""SmolLM2-135M merged: three experts fine-tuned on real texts, and the perplexity of every merge on held-out texts.

    python benchmarks/smollm2.py [--seed 0] [--keep DIR] [--report]

A seed draws other texts and trains experts of its own; the tables are of all seeds that were measured. Merges go by
recipes from directory to directory, LOT Merging and RegMean block by block. Writes benchmarks/results/smollm2.json and
the tables of docs/smollm2.md; the models are removed at the end. With --keep they stay in DIR, and an interrupted run
goes on there. Needs the extra "bench".
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import yaml
from results import RESULTS, ROOT, environment, measured, put
from safetensors.torch import save_file
from smollm2_experts import Windows, fine_tune, load_base, load_windows, perplexity, read_windows, save_windows
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from statsmerge_ext import run_merge
from statsmerge_ext.evaluation.datasets import PackageStore
from statsmerge_ext.evaluation.report import markdown_table
from statsmerge_ext.memory import keep_freed_memory

PAGE, RECORDS = ROOT / "docs" / "smollm2.md", RESULTS / "smollm2.json"
#: In the models' directory: what was measured so far.
FACTS = "facts.json"
STRONG = "drift_compensation, r = 1"


@dataclass(frozen=True)
class Settings:
    """How much is trained, looked at and measured; a window is as many tokens of running text.

    Attributes:
        seed: of the draw of texts, and all that is random in merges.
        steps, batch, lr: of fine-tuning an expert: AdamW steps, windows in each, the largest learning rate.
        validation, test: windows of each domain.
        samples, followed, taught: windows of each domain that methods with Gram matrices, drift compensation and
            StatsMerging see.
        epochs: of StatsMerging, one window of each domain a step.
        factors: method -> the scaling factors that the validation windows choose from; LOT's have 1 among them.
    """

    seed: int = 0
    tokens: int = 256
    steps: int = 40
    batch: int = 1
    lr: float = 2e-4
    validation: int = 6
    test: int = 12
    samples: int = 16
    followed: int = 8
    taught: int = 4
    epochs: int = 8
    factors: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "task_arithmetic": (0.4, 0.6, 0.8),
            "ties": (1.0, 1.5),
            "lot": (0.9, 1.0, 1.1),
        }
    )


class Bench:
    """Models in a directory, and everything that is measured of them.

    Attributes:
        directory: has the base under "base"; gets the experts and the merged models.
        windows: the texts.
        facts: what was measured, JSON-able; kept in the directory, so that nothing is measured twice.
    """

    def __init__(self, directory: Path, texts: Windows, settings: Settings) -> None:
        self.directory, self.windows, self.settings = directory, texts, settings
        self.facts: dict = {"stages": {}, "rows": {}}
        if (directory / FACTS).exists():
            self.facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        self.facts["settings"] = asdict(settings)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of what is done meanwhile to those of ``name``."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        spent = self.facts["stages"].setdefault(name, {"seconds": 0.0, "processor_seconds": 0.0})
        spent["seconds"] += time.perf_counter() - wall
        spent["processor_seconds"] += time.process_time() - processor
        (self.directory / FACTS).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {spent['seconds']:.0f} s, {spent['processor_seconds']:.0f} s of processors", flush=True)

    def load(self, name: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.directory / name).eval()

    def train(self, name: str) -> dict:
        """Make the expert of a domain."""
        with self.stage("fine-tuning"):
            setting = {key: getattr(self.settings, key) for key in ("steps", "batch", "lr")}
            expert = fine_tune(self.load("base"), self.windows[name]["train"], **setting)
            expert.save_pretrained(self.directory / name)
        return {}

    def merge(self, out: str, method: str, models: Sequence[str], samples: int = 0, **parameters: object) -> dict:
        """Merge by a recipe into a directory; returns the report."""
        recipe = {"merge_method": method, "base_model": "base", "models": [{"model": name} for name in models]}
        recipe["parameters"] = parameters
        if samples:
            recipe["calibration"] = {"data": {}, "samples": samples, "batch_size": 1}
            for name in models:
                recipe["calibration"]["data"][name] = f"{name}-samples.safetensors"
                save_file({"input_ids": self.windows[name]["train"]}, self.directory / f"{name}-samples.safetensors")
        path = self.directory / f"{out}.yml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return run_merge(path, self.directory / out, random_seed=self.settings.seed, progress=False, overwrite=True)

    def perplexities(self, name: str, split: str) -> dict[str, float]:
        """Domain -> perplexity of a model in the directory."""
        model, count = self.load(name), getattr(self.settings, split)
        return {domain: perplexity(model, texts[split][:count]) for domain, texts in self.windows.items()}

    def merged(self, method: str, samples: int = 0, name: str = "", **parameters: object) -> dict:
        """Merge the experts by a method as it is, under its own name or another."""
        name = name or method
        with self.stage(f"merging, {name}"):
            report = self.merge(name, method, list(self.windows), samples, **parameters)
        return {"parameters": parameters, "in_memory": report.get("in_memory")}

    def scaled(self, method: str) -> dict:
        """Merge by a method without data, with the scaling factor that the validation windows choose."""
        names = {factor: f"{method}-{factor:g}" for factor in self.settings.factors[method]}
        with self.stage(f"merging, {method}"):
            for factor, name in names.items():
                self.merge(name, method, list(self.windows), scaling_factor=factor)
        return self.choose(method, names)

    def lot(self) -> dict:
        """LOT Merging, solved once: its solution is T*, and the model base + λ T* for every λ of the choice."""
        with self.stage("merging, lot"):
            report = self.merge("lot-1", "lot", list(self.windows), self.settings.samples, scaling_factor=1.0)
        names = {factor: f"lot-{factor:g}" for factor in self.settings.factors["lot"]}
        with self.stage("scaling, lot"):
            for factor, name in names.items():
                if factor != 1.0:
                    self.merge(name, "task_arithmetic", ["lot-1"], scaling_factor=factor)
        return {**self.choose("lot", names), "in_memory": report.get("in_memory")}

    def choose(self, method: str, names: Mapping[float, str]) -> dict:
        """Keep the model with the smallest mean log-perplexity on the validation windows, under the method's name."""
        with self.stage("choosing scaling factors"):
            scores = {
                factor: sum(map(math.log, self.perplexities(name, "validation").values())) / len(self.windows)
                for factor, name in names.items()
            }
        best = min(scores, key=scores.get)
        shutil.rmtree(self.directory / method, ignore_errors=True)
        for factor, name in names.items():
            if factor == best:
                (self.directory / name).rename(self.directory / method)
            else:
                shutil.rmtree(self.directory / name)
        return {"scaling_factor": best, "validation": scores}

    def run(self) -> dict:
        """Train the experts, merge them by every method, measure all that is not yet measured; returns the facts."""
        settings = self.settings
        learning = {"loss": "kl", "epochs": settings.epochs, "lr": 1e-2, "autocast": True}
        rows = {
            "base": dict,
            **{name: partial(self.train, name) for name in self.windows},
            "linear": partial(self.merged, "linear"),
            "task_arithmetic": partial(self.scaled, "task_arithmetic"),
            "ties": partial(self.scaled, "ties"),
            "lot": self.lot,
            "regmean": partial(self.merged, "regmean", settings.samples),
            "stats_merging": partial(self.merged, "stats_merging", settings.taught, **learning),
            "drift_compensation": partial(self.merged, "drift_compensation", settings.followed, scaling_factor=1.0),
            STRONG: partial(
                self.merged, "drift_compensation", settings.followed, STRONG, scaling_factor=1.0, ridge=1.0
            ),
        }
        for name, make in rows.items():
            if name not in self.facts["rows"]:
                made = make()
                with self.stage("testing"):
                    self.facts["rows"][name] = {"test": self.perplexities(name, "test"), **made}
                print(name, self.facts["rows"][name], flush=True)
        return self.facts


def report(seeds: Sequence[dict]) -> None:
    """Write the tables of the page from the facts of some seeds."""
    first, domains = seeds[0], list(seeds[0]["windows"])

    def above(facts: dict, name: str, domain: str) -> float:
        """By how much, in percent, a model's perplexity exceeds that of the domain's expert."""
        return 100 * (facts["rows"][name]["test"][domain] / facts["rows"][domain]["test"][domain] - 1)

    def mean_above(facts: dict, name: str) -> float:
        return 100 * (geometric_mean(1 + above(facts, name, domain) / 100 for domain in domains) - 1)

    lines = []
    for name, row in first["rows"].items():
        title = f"expert of {name}" if name in domains else name
        if "scaling_factor" in row:
            chosen = dict.fromkeys(f"{facts['rows'][name]['scaling_factor']:g}" for facts in seeds)
            title += f", λ = {', '.join(chosen)}"
        cells = []
        for domain in domains:
            perplexity = geometric_mean(facts["rows"][name]["test"][domain] for facts in seeds)
            cells.append(f"{perplexity:.2f} ({_with_range([above(facts, name, domain) for facts in seeds])} %)")
        spent = [facts["stages"].get(f"merging, {name}", {}).get("processor_seconds") for facts in seeds]
        merges = len(row.get("validation", [""])) if name != "lot" else 1  # LOT's is solved once
        mean = f"{_with_range([mean_above(facts, name) for facts in seeds])} %"
        lines.append([title, *cells, mean, f"{statistics.median(spent) / merges:.0f}" if spent[0] else ""])
    table = markdown_table(["perplexity", *domains, "mean", "merging, s"], lines)
    sentences = []
    for name in ("lot", "task_arithmetic"):
        worst, domain = max((above(facts, name, domain), domain) for facts in seeds for domain in domains)
        sentences.append(f"`{name}` exceeds no expert by more than {worst:.1f} % ({domain}).")
    caption = (
        "Experts are fine-tuned in {steps} steps of {batch} window(s) of {tokens} tokens, learning rate {lr:g}. LOT "
        "Merging and RegMean see {samples} windows a domain, drift compensation {followed}, StatsMerging {taught} "
        "in {epochs} epochs. Scaling factors are chosen on {validation} windows; perplexities are those of {test}. "
    ).format(**first["settings"])
    spread = f"Geometric means of {len(seeds)} seeds; ± half the range. " if len(seeds) > 1 else "One seed. "
    when = " ".join(dict.fromkeys(measured(facts["environment"]) for facts in seeds))
    put(PAGE, "perplexity", f"{caption}{spread}{when}\n\n{table}\n\n{' '.join(sentences)}")
    kinds = ("seconds", "processor_seconds")
    times = [
        [stage, *(f"{statistics.median(facts['stages'][stage][kind] for facts in seeds):.0f}" for kind in kinds)]
        for stage in first["stages"]
    ]
    whole = [[sum(spent[kind] for spent in facts["stages"].values()) for facts in seeds] for kind in kinds]
    times.append(["all", *(f"{statistics.median(of_kind):.0f}" for of_kind in whole)])
    threads = f"{first['environment']['threads']} thread(s), medians"
    put(PAGE, "seconds", markdown_table([threads, "seconds", "seconds of processors"], times))


def _with_range(values: Sequence[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave the models there, and go on with those that are there"
    )
    parser.add_argument("--seed", type=int, default=0, help="of texts and merges")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        measure(Settings(options.seed), options.keep)
    report(list(json.loads(RECORDS.read_text(encoding="utf-8")).values()))


def measure(settings: Settings, keep: Path | None) -> None:
    """Measure all of a seed, with models that are kept, if anywhere, in ``keep``."""
    keep_freed_memory()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="statsmerge-") as scratch:
        directory = keep or Path(scratch) / "models"
        directory.mkdir(parents=True, exist_ok=True)
        store = PackageStore(Path(scratch))
        bench = Bench(directory, {}, settings)
        if "loading the base" not in bench.facts["stages"]:
            with bench.stage("loading the base"):
                load_base(store, directory / "base")
        if "reading texts" not in bench.facts["stages"]:
            with bench.stage("reading texts"):
                tokenizer = AutoTokenizer.from_pretrained(directory / "base")
                save_windows(read_windows(store, tokenizer, settings.tokens, settings.seed), directory)
        bench.windows |= load_windows(directory)
        counts = {name: {part: len(rows) for part, rows in parts.items()} for name, parts in bench.windows.items()}
        facts = {"environment": environment(), "windows": counts, **bench.run()}
    known = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    known[str(settings.seed)] = facts
    RECORDS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
