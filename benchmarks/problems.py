"""What whole merges and training steps are timed on: a base, eight experts, and unlabelled batches of their tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from harness import seeded
from torch import Tensor, nn

TASKS = 8
SAMPLES = 64
BATCH_SIZE = 32
VIT_SHAPE = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}

State = Mapping[str, Tensor]


@dataclass
class Problem:
    """A base, its experts, and unlabelled batches of each expert's task."""

    model: nn.Module
    base: State
    experts: dict[str, State]
    batches: dict[str, list[Tensor]]
    forward: Callable[[nn.Module, Tensor], Tensor]


def vit_model(**changes: int) -> nn.Module:
    """A vision transformer of ViT-B/32's shape, but for ``changes``, with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPVisionModel(CLIPVisionConfig(**{**VIT_SHAPE, **changes})).eval()


def vit_forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(pixel_values=batch).pooler_output


def vit(samples: int = SAMPLES) -> Problem:
    """A vision transformer of ViT-B/32's shape with random weights, experts near it, random images."""
    model = vit_model()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    generator = seeded()
    experts = {f"task{k}": {key: moved(value, generator) for key, value in base.items()} for k in range(TASKS)}
    side = VIT_SHAPE["image_size"]
    images = torch.randn(TASKS, samples, 3, side, side, generator=generator)
    batches = {name: list(images[k].split(BATCH_SIZE)) for k, name in enumerate(experts)}
    return Problem(model, base, experts, batches, vit_forward)


def vision8() -> Problem:
    """The package's own suite: EfficientNet-Lite0 with depthwise convolutions, eight fine-tuned experts."""
    from statsmerge_ext.evaluation.comparison import calibration_of, load_models
    from statsmerge_ext.evaluation.suites import get_suite

    suite = get_suite("vision8")
    suite.prepare(progress=False)
    model, experts = load_models(suite)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    return Problem(model, base, experts, calibration_of(suite, samples=SAMPLES), suite.forward)


def moved(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value.clone()
    size = 0.2 * float(value.std(correction=0)) or 0.01
    return torch.empty_like(value).uniform_(-size, size, generator=generator).add_(value)


def resident(field: str) -> int:
    """``field`` of this process's status in bytes: "VmRSS" is held now, "VmHWM" the most since it was reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def reset_peak() -> None:
    """Begin anew with "VmHWM"."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
