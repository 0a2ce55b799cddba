"""Recipes in the form of mergekit's own examples for the methods that both have run as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statsmerge_ext import run_merge
from statsmerge_ext.checkpoints import open_checkpoint
from tests.test_streamed import save_family

EXAMPLES = {
    "linear": """
models:
  - model: owner/a
    parameters:
      weight: 1.0
  - model: owner/b
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
""",
    "ties with gradients and filters": """
models:
  - model: owner/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: owner/b
    parameters:
      density: 0.33
      weight:
        - filter: big
          value: 0.5
        - value: 0
merge_method: ties
base_model: owner/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties as a weighted sum": """
models:
  - model: owner/a
    parameters:
      density: 0.5
      weight: 0.5
  - model: owner/b
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: owner/base
parameters:
  normalize: false
  int8_mask: true
dtype: float16
""",
    "ties with the base among the models": """
models:
  # - model: owner/b
  - model: owner/a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: owner/base
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
merge_method: ties
# base_model: owner/a
base_model: owner/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16""",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_unchanged(tmp_path, example):
    (tmp_path / "owner").mkdir()
    save_family(tmp_path / "owner")
    (tmp_path / "example.yml").write_text(EXAMPLES[example])
    report = run_merge(tmp_path / "example.yml", tmp_path / "out", progress=False)
    merged, base, a, b = (open_checkpoint(tmp_path / path) for path in ("out", "owner/base", "owner/a", "owner/b"))
    assert {merged.dtype(name) for name in merged if merged.dtype(name).is_floating_point} == {torch.float16}
    expected = reference(example, *(state["big"].double() for state in (base, a, b)))
    torch.testing.assert_close(merged["big"].double(), expected, rtol=2e-3, atol=2e-3)
    assert report["method"] == ("linear" if example == "linear" else "ties")


def reference(example: str, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What mergekit documents for a parameter in no block, in float64: gradients start at their first value."""

    def trimmed(task_vector: torch.Tensor, density: float) -> torch.Tensor:
        cut = task_vector.abs().flatten().kthvalue(task_vector.numel() - int(density * task_vector.numel()) + 1).values
        return task_vector * (task_vector.abs() >= cut)

    if example == "linear":
        return (1.0 * a + 0.3 * b) / 1.3
    if example == "ties with the base among the models":
        return base + trimmed(a - base, 1.0)
    densities, weights, normalize = (
        ((1.0, 0.33), (1.0, 0.5), True)
        if "gradients" in example
        else (
            (0.5, 0.5),
            (0.5, 0.5),
            False,
        )
    )
    weighted = [w * trimmed(x - base, d) for x, d, w in zip((a, b), densities, weights, strict=True)]
    sign = sum(weighted).sign()
    agreeing = [x * (x * sign > 0) for x in weighted]
    total = sum(agreeing)
    if not normalize:
        return base + total
    counts = sum(w * (x != 0).double() for w, x in zip(weights, agreeing, strict=True))
    return base + total / counts.clamp_min(1e-30)


def test_names_of_models_are_paths_beside_the_recipe(tmp_path):
    (tmp_path / "owner").mkdir()
    save_family(tmp_path / "owner")
    (tmp_path / "example.yml").write_text(EXAMPLES["linear"].replace("owner/b", "owner/missing"))
    with pytest.raises(Exception, match="owner/missing: no such file or directory .*nothing is downloaded"):
        run_merge(Path(tmp_path / "example.yml"), tmp_path / "out", progress=False)
