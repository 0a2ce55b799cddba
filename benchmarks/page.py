"""Write the tables and plots of docs/benchmarks.md from what `make bench` measured.

    python benchmarks/page.py

Reads benchmarks/results/operators.json and operators_avx2.json (pytest-benchmark's format); fills the places between
markers in docs/benchmarks.md and draws docs/benchmarks/OPERATOR.svg. No number on the page comes from anywhere else.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"
RUNS = {"native": "operators.json", "avx2": "operators_avx2.json"}
OURS = "statsmerge"
CEILINGS = {
    "read": ("reading", "GB/s"),
    "copy": ("copying, read + written", "GB/s"),
    "update": ("adding in place, read + written", "GB/s"),
    "float32": ("float32 products", "GFLOP/s"),
    "float64": ("float64 products", "GFLOP/s"),
    "bfloat16": ("bfloat16 products", "GFLOP/s"),
}


@dataclass(frozen=True)
class Ceilings:
    """The best rate of every kind that was measured, in bytes or FLOPs a second."""

    rates: Mapping[str, float]

    def bandwidth(self, work: Mapping) -> float:
        kinds = ("read", "copy", "update") if work["written"] else ("read",)
        return max(self.rates[kind] for kind in kinds)

    def arithmetic(self, dtype: str) -> float:
        """No library may reach what the units can do: float64 ones do half of float32's, bfloat16 at least as much."""
        single = self.rates["float32"]
        return max(self.rates.get(dtype, 0.0), {"float64": single / 2}.get(dtype, single))

    def floor(self, work: Mapping) -> float:
        """The seconds that ``work`` takes at the ceilings."""
        moving = (work["read"] + work["written"]) / self.bandwidth(work)
        return max(moving, work["flops"] / self.arithmetic(work["dtype"]))


@dataclass(frozen=True)
class Measured:
    """One route of one case."""

    seconds: list[float]
    errors: Mapping[str, float]
    work: Mapping | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def share(self, ceilings: Ceilings) -> float | None:
        """The floor over the median; None for a route whose floor is not known."""
        return None if self.work is None else ceilings.floor(self.work) / self.median


@dataclass
class Case:
    """All routes of one case in one run."""

    name: str
    routes: dict[str, Measured]
    bars: list[Mapping]

    def ratio(self, route: str, of: str = "seconds") -> float:
        """How many times as long as ours ``route`` takes, or how much more of something else it has."""
        if of == "seconds":
            return self.routes[route].median / self.routes[OURS].median
        return self.routes[route].errors[of] / self.routes[OURS].errors[of]

    def missed(self, bar: Mapping) -> bool:
        return self.ratio(bar["peer"], bar["of"]) < bar["at_least"]


@dataclass
class Run:
    """One run of the suite: facts about the machine, ceilings, and operator -> case -> what was measured."""

    facts: Mapping
    ceilings: Ceilings
    operators: dict[str, dict[str, Case]] = field(default_factory=dict)


def read_run(path: Path) -> Run:
    content = json.loads(path.read_text(encoding="utf-8"))
    rates: dict[str, float] = {}
    run = Run({**content["machine_info"], **content["commit_info"], "date": content["datetime"][:10]}, Ceilings(rates))
    for entry in content["benchmarks"]:
        extra, seconds = entry["extra_info"], entry["stats"]["data"]
        if "ceiling" in extra:
            kind = extra["ceiling"]
            rates[kind] = max(rates.get(kind, 0.0), extra["amount"] / min(seconds))
            continue
        if "routes" not in extra:  # a case whose result was not good enough has no times
            continue
        routes = {
            name: Measured(route["seconds"] or seconds, route["errors"], route["work"])
            for name, route in extra["routes"].items()
        }
        caches = "" if extra["caches"] == "cold" else ", warm caches"
        case = Case(extra["case"] + caches, routes, extra["bars"])
        run.operators.setdefault(entry["group"], {})[case.name] = case
    return run


def milliseconds(measured: Measured) -> str:
    first, third = measured.quartiles
    if first == third:
        return f"{_number(1e3 * measured.median)}"
    return f"{_number(1e3 * measured.median)} [{_number(1e3 * first)}, {_number(1e3 * third)}]"


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".replace(",", " ")


def _errors(errors: Mapping[str, float]) -> str:
    return "; ".join(
        (f"{name} " if name != "error" else "") + (f"{value:.1e}" if value < 1 else _number(value))
        for name, value in errors.items()
    )


def _bars(case: Case, route: str) -> str:
    texts = []
    for bar in case.bars:
        if bar["peer"] == route:
            text = f"≥ {bar['at_least']:g} ×" + (f", towards {bar['towards']:g} ×" if bar["towards"] else "")
            if bar["of"] != "seconds":  # it has no column of its own
                text += f" {bar['of']}: {_number(case.ratio(route, bar['of']))} ×" + " ✗" * case.missed(bar)
            texts.append(text)
    return "; ".join(texts)


def _ratio(case: Case, route: str) -> str:
    if route == OURS:
        return ""
    missed = any(case.missed(bar) for bar in case.bars if bar["peer"] == route and bar["of"] == "seconds")
    return f"{_number(case.ratio(route))} ×" + " ✗" * missed


def operator_table(runs: Mapping[str, Run], operator: str) -> str:
    """One line a route, the targets side by side."""
    head = ["case", "route"]
    for target in runs:
        head += [f"{target}: ms [quartiles]", "× ours", "of the ceiling"]
    lines = [head + ["error", "bar"]]
    cases = next(iter(runs.values())).operators[operator]
    for name, case in cases.items():
        found = [run.operators.get(operator, {}).get(name) for run in runs.values()]
        for route, measured in case.routes.items():
            row = [f"**{name}**" if route == OURS else "", route]
            for run, here in zip(runs.values(), found, strict=True):
                if here is None or route not in here.routes:
                    row += ["", "", ""]
                    continue
                share = here.routes[route].share(run.ceilings)
                row += [milliseconds(here.routes[route]), _ratio(here, route), "" if share is None else f"{share:.0%}"]
            lines.append([*row, _errors(measured.errors), _bars(case, route)])
    return _markdown(lines)


def ceiling_table(runs: Mapping[str, Run]) -> str:
    lines = [["ceiling", *runs]]
    for kind, (name, unit) in CEILINGS.items():
        rates = [run.ceilings.rates.get(kind) for run in runs.values()]
        lines.append([f"{name}, {unit}", *("" if rate is None else f"{rate / 1e9:.0f}" for rate in rates)])
    return _markdown(lines)


def facts_line(run: Run) -> str:
    facts = run.facts
    dirty = " with local changes" if facts.get("dirty") else ""
    return (
        f"{facts['cpu']['brand_raw']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"Python {facts['python_version']}; {facts['date']}, commit {facts.get('id', 'unknown')[:7]}{dirty}."
    )


def _markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def draw(runs: Mapping[str, Run], operator: str, path: Path) -> None:
    """Times of all routes of every case, and the floor of ours, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": operator, "font.size": 8})
    import matplotlib.pyplot as plt

    names = list(next(iter(runs.values())).operators[operator])
    cases = [case for run in runs.values() for case in run.operators.get(operator, {}).values()]
    peers = sorted({route for case in cases for route in case.routes} - {OURS})
    colours = {name: f"C{place + 1}" for place, name in enumerate(peers)}
    height = 1.2 + 0.28 * len(names) + 0.05 * len(peers)
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), height), sharey=True, squeeze=False)
    for axis, (target, run) in zip(axes[0], runs.items(), strict=True):
        for place, name in enumerate(names):
            case = run.operators.get(operator, {}).get(name)
            if case is None:
                continue
            for route, measured in case.routes.items():
                ours = route == OURS
                style = {"color": "black", "marker": "D"} if ours else {"color": colours[route], "marker": "o"}
                axis.plot(
                    1e3 * measured.median, place, linestyle="", markersize=4, label=route, zorder=2 + ours, **style
                )
                if ours and measured.work is not None:
                    floor = 1e3 * run.ceilings.floor(measured.work)
                    axis.plot(floor, place, marker="|", color="red", markersize=9, linestyle="", label="floor of ours")
        axis.set(xscale="log", xlabel="milliseconds", title=target)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.25)
    axes[0][0].invert_yaxis()
    legend = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def fill(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between the markers of ``name``. Raises SystemExit if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    text, found = re.subn(pattern, lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)
    if not found:
        raise SystemExit(f"the page has no place for {name}: {begin} … {end}")
    return text


def main() -> None:
    runs = {target: read_run(RESULTS / name) for target, name in RUNS.items() if (RESULTS / name).exists()}
    if not runs:
        raise SystemExit(f"{RESULTS} holds none of {', '.join(RUNS.values())}: run `make bench` first")
    first = next(iter(runs.values()))
    text = fill(PAGE.read_text(encoding="utf-8"), "machine", facts_line(first))
    text = fill(text, "ceilings", ceiling_table(runs))
    for operator in first.operators:
        plot = PLOTS / f"{operator}.svg"
        draw(runs, operator, plot)
        picture = f"![{operator}: times and floors]({plot.relative_to(PAGE.parent)})"
        text = fill(text, operator, f"{operator_table(runs, operator)}\n\n{picture}")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
