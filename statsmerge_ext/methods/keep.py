"""The base as it is: for layers that shall not be merged."""

from __future__ import annotations

from dataclasses import replace

from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.methods.registry import register_method


@register_method("keep", by_layer=True)
def keep(problem: MergeProblem) -> Solution:
    """θ = θ_0, bit by bit; the experts are not even read."""
    alone = replace(problem, experts={})
    # A copy: what is read is read over again by later pieces.
    return alone.map_elements(lambda piece, base, task_vectors: base.clone(), is_weighted_sum=True)
