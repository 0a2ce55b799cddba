"""One route of one whole merge, in a process of its own so that its peak memory is its own.

    python benchmarks/merges.py CASE ROUTE RESULT

Sets everything up, writes "ready", waits for a line on its input, runs the route once, saves the result to the file
RESULT and writes one line of JSON: the bytes held before the run and the most that were held during it.
The plain-torch routes stand here in full: what one writes from the papers' formulas with torch alone. Linux only, for
the sake of /proc.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import target  # noqa: F401  before torch
import torch
import torch.nn.functional as F
from harness import seeded
from torch import Tensor, nn
from torch.func import functional_call

import statsmerge_ext
from statsmerge_ext.engine.merged_model import LayerWiseMergedModel
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.engine.together import join, samples, take_apart
from statsmerge_ext.layers import find_layers
from statsmerge_ext.memory import keep_freed_memory

TASKS = 8
SAMPLES = 64
BATCH_SIZE = 32
SCALING_FACTOR = 1.2
VIT_SHAPE = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}

State = Mapping[str, Tensor]
Grams = dict[str, Tensor]


@dataclass
class Problem:
    """A base, its experts, and unlabelled batches of each expert's task."""

    model: nn.Module
    base: State
    experts: dict[str, State]
    batches: dict[str, list[Tensor]]
    forward: Callable[[nn.Module, Tensor], Tensor]


# What is merged.


def vit(samples: int = SAMPLES) -> Problem:
    """A vision transformer of ViT-B/32's shape with random weights, experts near it, random images."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPVisionModel(CLIPVisionConfig(**VIT_SHAPE)).eval()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    generator = seeded()
    experts = {f"task{k}": {key: _moved(value, generator) for key, value in base.items()} for k in range(TASKS)}
    side = VIT_SHAPE["image_size"]
    images = torch.randn(TASKS, samples, 3, side, side, generator=generator)
    batches = {name: list(images[k].split(BATCH_SIZE)) for k, name in enumerate(experts)}
    return Problem(model, base, experts, batches, lambda model, batch: model(pixel_values=batch).pooler_output)


def vision8() -> Problem:
    """The package's own suite: EfficientNet-Lite0 with depthwise convolutions, eight fine-tuned experts."""
    from statsmerge_ext.evaluation.comparison import calibration_of, load_models
    from statsmerge_ext.evaluation.suites import get_suite

    suite = get_suite("vision8")
    suite.prepare(progress=False)
    model, experts = load_models(suite)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    return Problem(model, base, experts, calibration_of(suite, samples=SAMPLES), suite.forward)


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value.clone()
    size = 0.2 * float(value.std(correction=0)) or 0.01
    return torch.empty_like(value).uniform_(-size, size, generator=generator).add_(value)


# LOT Merging.


def ours_lot(problem: Problem) -> State:
    result = statsmerge_ext.merge(
        "lot",
        base=problem.model,
        experts=problem.experts,
        calibration=problem.batches,
        forward=problem.forward,
        scaling_factor=SCALING_FACTOR,
    )
    return result.state


@torch.no_grad()
def forward_passes(problem: Problem) -> None:
    """The floor of every method that looks at data."""
    for name, state in problem.experts.items():
        problem.model.load_state_dict(state)
        for batch in problem.batches[name]:
            problem.forward(problem.model, batch)


@torch.no_grad()
def plain_lot(problem: Problem) -> State:
    """LOT Merging (arXiv 2505.23859) from its formulas: hooks, x.T @ x, and the pseudo-inverse."""
    grams: dict[str, Grams] = {}
    squares: dict[str, Grams] = {}
    for name, state in problem.experts.items():
        problem.model.load_state_dict(state)
        grams[name], squares[name] = {}, {}
        with _watching(problem.model, partial(_add_gram, grams[name]), partial(_add_squares, squares[name])):
            for batch in problem.batches[name]:
                problem.forward(problem.model, batch)
    merged = {}
    for key, base in problem.base.items():
        if not base.is_floating_point():
            merged[key] = base
            continue
        task_vectors = [state[key] - base for state in problem.experts.values()]
        if key in next(iter(grams.values())):
            total = sum(grams[name][key] for name in grams)
            matrices = [t.reshape(*total.shape[:-2], -1, total.shape[-1]) for t in task_vectors]
            product = sum(t @ grams[name][key] for name, t in zip(grams, matrices, strict=True))
            optimal = (product @ torch.linalg.pinv(total)).reshape(base.shape)
        elif key in next(iter(squares.values())):
            weights = torch.stack([squares[name][key] for name in squares])
            optimal = (weights * torch.stack(task_vectors)).sum(0) / weights.sum(0)
        else:
            optimal = torch.stack(task_vectors).mean(0)
        is_buffer = key.endswith(("running_mean", "running_var"))
        merged[key] = base + optimal * (1.0 if is_buffer else SCALING_FACTOR)
    return merged


@contextmanager
def _watching(model: nn.Module, on_matrix: Callable, on_scale: Callable) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(partial(on_matrix, f"{path}.weight")))
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            handles.append(module.register_forward_pre_hook(partial(on_scale, f"{path}.weight")))
    yield
    for handle in handles:
        handle.remove()


def _features(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer's matrix multiplies: [tokens, in], or [groups, tokens, in] of a grouped convolution."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    x = getattr(module, "static_padding", nn.Identity())(x)  # EfficientNet-Lite's convolutions pad by themselves
    padding = module.padding if isinstance(module.padding, tuple) else 0
    columns = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    columns = columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return columns if module.groups > 1 else columns[0]


def _add_gram(grams: Grams, key: str, module: nn.Module, args: tuple) -> None:
    x = _features(module, args[0])
    gram = x.mT @ x
    grams[key] = grams[key] + gram if key in grams else gram


def _add_squares(squares: Grams, key: str, module: nn.Module, args: tuple) -> None:
    x = args[0]
    if isinstance(module, nn.LayerNorm):
        square = F.layer_norm(x, module.normalized_shape, eps=module.eps).square().flatten(0, -2).sum(0)
    else:
        mean, var = (stat.reshape(-1, 1, 1) for stat in (module.running_mean, module.running_var))
        square = ((x - mean).square() / (var + module.eps)).sum((0, 2, 3))
    squares[key] = squares[key] + square if key in squares else square


@torch.no_grad()
def exact_lot(problem: Problem, keys: tuple[str, ...]) -> State:
    """For a few layers: T* from float64 sums of the same float32 features, and the Gram C that weighs errors."""
    grams: dict[str, Grams] = {}
    modules = dict(problem.model.named_modules())
    for name, state in problem.experts.items():
        problem.model.load_state_dict(state)
        grams[name] = {}

        def add(key: str, module: nn.Module, args: tuple, sums: Grams = grams[name]) -> None:
            x = _features(module, args[0]).double()
            sums[key] = sums.get(key, 0) + x.mT @ x

        handles = [modules[key[: -len(".weight")]].register_forward_pre_hook(partial(add, key)) for key in keys]
        for batch in problem.batches[name]:
            problem.forward(problem.model, batch)
        for handle in handles:
            handle.remove()
    result = {}
    for key in keys:
        total = sum(grams[name][key] for name in grams)
        task_vectors = [(s[key].double() - problem.base[key].double()) for s in problem.experts.values()]
        matrices = [t.reshape(*total.shape[:-2], -1, total.shape[-1]) for t in task_vectors]
        product = sum(t @ grams[name][key] for name, t in zip(grams, matrices, strict=True))
        rcond = torch.finfo(torch.float32).eps
        result |= {f"base/{key}": problem.base[key], f"gram/{key}": total}
        result[f"exact/{key}"] = product @ torch.linalg.pinv(total, rtol=rcond, hermitian=True)
    return result


def output_error(state: State, exact: State) -> float:
    """The largest relative error of the outputs of the layers in ``exact`` (what :func:`exact_lot` gives)."""
    found = []
    for key in [name.removeprefix("exact/") for name in exact if name.startswith("exact/")]:
        solution, gram = exact[f"exact/{key}"], exact[f"gram/{key}"]
        merged = (state[key].double() - exact[f"base/{key}"].double()) / SCALING_FACTOR
        difference = merged.reshape(solution.shape) - solution
        found.append(float(((difference @ gram) * difference).sum() / ((solution @ gram) * solution).sum()) ** 0.5)
    return max(found)


# One training step of StatsMerging: the coefficients' gradient.


@dataclass
class Step:
    """What one step needs beside the models: coefficients [L, K], a frozen head and a target for every sample."""

    problem: Problem
    coefficients: Tensor
    head: Tensor
    targets: Tensor

    def loss(self, k: int, features: Tensor) -> Tensor:
        return F.cross_entropy(features @ self.head.to(features.dtype), self.targets[k]) / TASKS


def step(samples: int) -> Step:
    problem = vit(samples)
    width = VIT_SHAPE["hidden_size"]
    head = torch.randn(width, 100, generator=seeded(1)) / width**0.5
    targets = torch.randint(100, (TASKS, samples), generator=seeded(2))
    problem.batches = {name: [torch.cat(batches)] for name, batches in problem.batches.items()}
    return Step(problem, torch.full((len(find_layers(problem.model)), TASKS), 0.3), head, targets)


class OurStep:
    """Merge once, run all tasks' samples as one batch, contract their gradients with the task vectors once."""

    def __init__(self, step: Step) -> None:
        problem = step.problem
        self.step = step
        self.merged = LayerWiseMergedModel(
            MergeProblem(
                layers=find_layers(problem.model),
                base=problem.base,
                experts=problem.experts,
                model=problem.model,
                forward=problem.forward,
            )
        )

    def __call__(self) -> State:
        coefficients = self.step.coefficients.clone().requires_grad_()
        self.merged.merge_weights(coefficients)
        batches = [batch for (batch,) in self.step.problem.batches.values()]
        features = take_apart(self.merged(join(batches)), [samples(batch) for batch in batches])
        self.merged.accumulate(sum(self.step.loss(k, part) for k, part in enumerate(features)))
        self.merged.backward()
        return {"gradient": coefficients.grad}


class PlainStep:
    """Weights as a function of the coefficients in autograd's own graph, which is walked once a task.

    ``rebuild`` merges anew for every task, as AdaMerging's code does; without it the graph is built once and kept, as
    FusionBench does.
    """

    def __init__(self, step: Step, *, rebuild: bool, dtype: torch.dtype = torch.float32) -> None:
        problem = step.problem
        self.step, self.rebuild = step, rebuild
        self.model = problem.model.to(dtype).requires_grad_(False)
        self.dtype = dtype
        self.keys = [layer.parameter for layer in find_layers(problem.model)]
        self.base = {key: problem.base[key].to(dtype) for key in self.keys}
        self.task_vectors = [
            {key: state[key].to(dtype) - self.base[key] for key in self.keys} for state in problem.experts.values()
        ]

    def merge(self, coefficients: Tensor) -> State:
        return {
            key: self.base[key] + sum(coefficients[row, k] * t[key] for k, t in enumerate(self.task_vectors))
            for row, key in enumerate(self.keys)
        }

    def __call__(self) -> State:
        coefficients = self.step.coefficients.to(self.dtype, copy=True).requires_grad_()
        forward = _Forward(self.model, self.step.problem.forward)
        merged = None if self.rebuild else self.merge(coefficients)
        for k, (batch,) in enumerate(self.step.problem.batches.values()):
            weights = self.merge(coefficients) if self.rebuild else merged
            weights = {f"model.{key}": value for key, value in weights.items()}
            loss = self.step.loss(k, functional_call(forward, weights, (batch.to(self.dtype),)))
            loss.backward(retain_graph=not self.rebuild)
        return {"gradient": coefficients.grad}


class _Forward(nn.Module):
    def __init__(self, model: nn.Module, forward: Callable) -> None:
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, batch: Tensor) -> Tensor:
        return self.function(self.model, batch)


class ForwardBackward:
    """The floor of a step: the model's own forward and backward passes, weights' gradients included.

    The merged weights are the same for all tasks, so their samples may also go ``together``.
    """

    def __init__(self, step: Step, *, together: bool) -> None:
        self.step, self.together = step, together
        step.problem.model.requires_grad_()

    def __call__(self) -> None:
        problem = self.step.problem
        problem.model.zero_grad()
        batches = [batch for (batch,) in problem.batches.values()]
        if self.together:
            features = problem.forward(problem.model, torch.cat(batches)).chunk(TASKS)
            sum(self.step.loss(k, part) for k, part in enumerate(features)).backward()
            return
        for k, batch in enumerate(batches):
            self.step.loss(k, problem.forward(problem.model, batch)).backward()


def _warmed(run: Callable) -> Callable:
    """A step is one of hundreds, so its first is not the one to time."""
    run()
    return run


VIT_LAYERS = (
    "encoder.layers.0.mlp.fc1.weight",
    "encoder.layers.6.mlp.fc2.weight",
    "encoder.layers.11.self_attn.q_proj.weight",
)
VISION8_LAYERS = ("_conv_stem.weight", "_blocks.1._depthwise_conv.weight", "_blocks.15._project_conv.weight")

#: case -> (its problem, route -> what makes the callable that is timed)
CASES: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "lot_vit": (
        vit,
        {
            "statsmerge": lambda problem: partial(ours_lot, problem),
            "plain torch": lambda problem: partial(plain_lot, problem),
            "forward passes": lambda problem: partial(forward_passes, problem),
            "exact": lambda problem: partial(exact_lot, problem, VIT_LAYERS),
        },
    ),
    "lot_vision8": (
        vision8,
        {
            "statsmerge": lambda problem: partial(ours_lot, problem),
            "plain torch": lambda problem: partial(plain_lot, problem),
            "forward passes": lambda problem: partial(forward_passes, problem),
            "exact": lambda problem: partial(exact_lot, problem, VISION8_LAYERS),
        },
    ),
    **{
        f"step_{samples}": (
            partial(step, samples),
            {
                "statsmerge": lambda s: _warmed(OurStep(s)),
                "graph a task": lambda s: _warmed(PlainStep(s, rebuild=True)),
                "graph kept": lambda s: _warmed(PlainStep(s, rebuild=False)),
                "forward + backward": lambda s: _warmed(ForwardBackward(s, together=False)),
                "the same, tasks together": lambda s: _warmed(ForwardBackward(s, together=True)),
                "exact": lambda s: PlainStep(s, rebuild=True, dtype=torch.float64),
            },
        )
        for samples in (1, 4)
    },
}


def resident(field: str) -> int:
    """``field`` of this process's status in bytes: "VmRSS" is held now, "VmHWM" the most since it was reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def main() -> None:
    case, route, path = sys.argv[1:]
    keep_freed_memory()
    make_problem, routes = CASES[case]
    run = routes[route](make_problem())
    held = resident("VmRSS")
    reset_peak()
    print("ready", flush=True)
    sys.stdin.readline()
    result = run()
    peak = resident("VmHWM")
    print(json.dumps({"held": held, "peak": peak}), flush=True)
    torch.save(result, path)


if __name__ == "__main__":
    main()
