"""Experts as they come back from being stored in few bits, and what that took on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from statsmerge_ext.checkpoints import open_expert, quantize_expert, quantize_experts

#: Task vectors as numbers; quantised one by one (TVQ); or what is left of each after their quantised mean (RTVQ).
FORMS = ("float32", "bfloat16", "int8", "int4", "residual int4", "int3", "residual int3", "int2", "residual int2")

State = Mapping[str, Tensor]


def store(base: State, experts: Mapping[str, State], form: str) -> tuple[dict[str, State], float]:
    """The experts after storing their task vectors in ``form``, one of :data:`FORMS`, and its bytes over float32's."""
    if "int" not in form:
        return _as_numbers(base, experts, form)
    kind, bits = form.split("int")
    with tempfile.TemporaryDirectory(prefix="statsmerge-") as folder:
        out = Path(folder, "experts")
        if kind:
            quantize_experts(base, experts, out, bits=int(bits))
        else:
            out.mkdir()
            for name, expert in experts.items():
                quantize_expert(base, expert, out / f"{name}.safetensors", bits=int(bits))
        taken = sum(path.stat().st_size for path in out.iterdir())
        stored = {name: dict(open_expert(out / f"{name}.safetensors", base)) for name in experts}
    whole = {name: {key: stored[name].get(key, value) for key, value in experts[name].items()} for name in experts}
    return whole, taken / _float32_bytes(experts)


def _as_numbers(base: State, experts: Mapping[str, State], form: str) -> tuple[dict[str, State], float]:
    if form == "float32":
        return dict(experts), 1.0
    rounded = {
        name: {
            key: base[key] + (value - base[key]).bfloat16() if value.is_floating_point() else value
            for key, value in expert.items()
        }
        for name, expert in experts.items()
    }
    return rounded, 0.5


def _float32_bytes(experts: Mapping[str, State]) -> int:
    return 4 * sum(value.numel() for state in experts.values() for value in state.values() if value.is_floating_point())
