"""What the report of a merge says beside the notes of its method."""

from __future__ import annotations

from collections.abc import Container, Mapping

from statsmerge_ext.layers import Layer
from statsmerge_ext.methods import Method


def facts_for_report(
    method: Method,
    hyperparameters: Mapping[str, object],
    layers: list[Layer],
    experts: list[str],
    buffers: str,
    seed: int,
) -> dict:
    """What was asked for, JSON-able."""
    return {**method.facts(layers, hyperparameters), "experts": experts, "buffers": buffers, "seed": seed}


def layer_report(layers: list[Layer], watched: list[Layer], seen: Container[str] | None) -> dict:
    """What became of each kind of layer, JSON-able.

    ``watched`` are the layers that evidence was needed of, ``seen`` the names of those that there is some of; None
    where none was needed.
    """
    kinds: dict[str, int] = {}
    for layer in layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    report = {"kinds": kinds, "bare_parameters": [x.name for x in layers if x.kind == "other"]}
    if seen is not None:
        report["never_called"] = [layer.name for layer in watched if layer.source and layer.name not in seen]
        report["tied"] = {x.name: list(x.tied) for x in layers if x.tied}
    return report
