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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import target  # noqa: F401  before torch
import torch
import torch.nn.functional as F
from problems import Problem, State, reset_peak, resident, vision8, vit
from steps import ForwardBackward, OurStep, PlainStep, StepsInMemory, exact_step, step, warmed
from torch import Tensor, nn

import statsmerge_ext
from statsmerge_ext.memory import keep_freed_memory
from statsmerge_ext.methods import get_method

SCALING_FACTOR = 1.2

Grams = dict[str, Tensor]


# LOT Merging.


def ours_lot(problem: Problem, **options) -> State:
    """By default with a small ridge; ``ridge=0`` takes the pseudo-inverse, as the other routes do."""
    result = statsmerge_ext.merge(
        "lot",
        base=problem.model,
        experts=problem.experts,
        calibration=problem.batches,
        forward=problem.forward,
        scaling_factor=SCALING_FACTOR,
        **options,
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
    """For a few layers: T* from float64 sums of the same float32 features, by the pseudo-inverse ("pinv") and with the
    package's default ridge ("ridge"), and the Gram C that weighs errors."""
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
    ridge = get_method("lot").hyperparameters["ridge"]
    for key in keys:
        total = sum(grams[name][key] for name in grams)
        task_vectors = [(s[key].double() - problem.base[key].double()) for s in problem.experts.values()]
        matrices = [t.reshape(*total.shape[:-2], -1, total.shape[-1]) for t in task_vectors]
        product = sum(t @ grams[name][key] for name, t in zip(grams, matrices, strict=True))
        rcond = torch.finfo(torch.float32).eps
        result |= {f"base/{key}": problem.base[key], f"gram/{key}": total}
        result[f"pinv/{key}"] = product @ torch.linalg.pinv(total, rtol=rcond, hermitian=True)
        mean = total.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        ridged = total + ridge * mean * torch.eye(total.shape[-1])  # singular where a group has no features
        result[f"ridge/{key}"] = product @ torch.linalg.pinv(ridged, hermitian=True)
    return result


def output_error(state: State, exact: State, kind: str) -> float:
    """The largest relative error of the outputs of the layers in ``exact``, what :func:`exact_lot` gives, against its
    solutions of a kind."""
    found = []
    for key in [name.removeprefix("gram/") for name in exact if name.startswith("gram/")]:
        solution, gram = exact[f"{kind}/{key}"], exact[f"gram/{key}"]
        merged = (state[key].double() - exact[f"base/{key}"].double()) / SCALING_FACTOR
        difference = merged.reshape(solution.shape) - solution
        found.append(float(((difference @ gram) * difference).sum() / ((solution @ gram) * solution).sum()) ** 0.5)
    return max(found)


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
            "statsmerge, ridge=0": lambda problem: partial(ours_lot, problem, ridge=0.0),
            "plain torch": lambda problem: partial(plain_lot, problem),
            "forward passes": lambda problem: partial(forward_passes, problem),
            "exact": lambda problem: partial(exact_lot, problem, VIT_LAYERS),
        },
    ),
    "lot_vision8": (
        vision8,
        {
            "statsmerge": lambda problem: partial(ours_lot, problem),
            "statsmerge, ridge=0": lambda problem: partial(ours_lot, problem, ridge=0.0),
            "plain torch": lambda problem: partial(plain_lot, problem),
            "forward passes": lambda problem: partial(forward_passes, problem),
            "exact": lambda problem: partial(exact_lot, problem, VISION8_LAYERS),
        },
    ),
    **{
        f"step_{samples}{'_autocast' * autocast}": (
            partial(step, samples, autocast),
            {
                "statsmerge": lambda s: warmed(OurStep(s)),
                "graph a task": lambda s: warmed(PlainStep(s, rebuild=True)),
                "graph kept": lambda s: warmed(PlainStep(s, rebuild=False)),
                "forward + backward": lambda s: warmed(ForwardBackward(s, together=False)),
                "the same, tasks together": lambda s: warmed(ForwardBackward(s, together=True)),
                "exact": lambda s: partial(exact_step, s),
            },
        )
        for samples in (1, 4)
        for autocast in (False, True)
    },
    **{
        f"memory_{storage}": (
            partial(StepsInMemory, storage),
            {"statsmerge": lambda steps: steps},
        )
        for storage in ("full", "bfloat16", "int8", "int4")
    },
}


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
