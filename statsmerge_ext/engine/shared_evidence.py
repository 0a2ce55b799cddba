"""Gram evidence that several processes collect together: each of its share of the samples, and then added up.

A share is made of whole batches, so that every sum has the terms that one process adds up. Alone, one process has all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from statsmerge_ext.calibration import Batch
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.together import samples
from statsmerge_ext.errors import CalibrationError
from statsmerge_ext.evidence import GramEvidence, collect_grams
from statsmerge_ext.layers import Layer


def shared_batches(batches: Mapping[str, list[Batch]]) -> dict[str, list[Batch]]:
    """This process's share of all experts' batches; consecutive ones, so that it needs few experts' weights."""
    pairs = [(name, batch) for name, of_expert in batches.items() for batch in of_expert]
    mine: dict[str, list[Batch]] = {name: [] for name in batches}
    for name, batch in processes.share(pairs, [samples(batch) for _, batch in pairs]):
        mine[name].append(batch)
    return mine


def collect_shared_grams(
    model: nn.Module,
    layers: list[Layer],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    batches: Mapping[str, list[Batch]],
    **options: object,
) -> GramEvidence:
    """As :func:`collect_grams`; of several processes, all of which call this alike, each runs its share of ``batches``.

    Raises as :func:`collect_grams` and :func:`added_up`.
    """
    mine = {name: of_expert for name, of_expert in shared_batches(batches).items() if of_expert}
    own = {name: experts[name] for name in mine}
    return added_up(collect_grams(model, layers, base, own, mine, **options), list(experts))


def added_up(part: GramEvidence, experts: list[str]) -> GramEvidence:
    """The evidence of all ``experts``, from what every process has of some of them; ``part`` gives its sums away.

    Raises:
        CalibrationError: layers that share an input in one process and not in another.
        ProcessError: another process has ended.
    """
    if processes.count() == 1:
        return part
    kinds = {"grams": part.grams, "products": part.products, "diagonals": part.diagonals, "weights": part.weights}
    forms = {kind: {name: _Form(x) for name, x in tensors.items()} for kind, tensors in kinds.items()}
    others = processes.of_all({"leaders": part.leaders, "forms": forms, "provenance": part.provenance})
    whole = GramEvidence(experts, provenance=_joined([other["provenance"] for other in others]))
    for other in others:
        for layer, leader in other["leaders"].items():
            if whole.leaders.setdefault(layer, leader) != leader:
                raise CalibrationError(
                    f"layer {layer!r} shares its input with {leader!r} in one process and in another with "
                    f"{whole.leaders[layer]!r}: the model's graph depends on its data"
                )
    places = [experts.index(name) for name in part.experts]
    for kind, tensors in kinds.items():
        of_all = {name: form for other in others for name, form in other["forms"][kind].items()}
        for name, form in of_all.items():
            mine = tensors.pop(name, None)
            if kind in ("diagonals", "weights"):  # of each expert
                full = form.zeros(len(experts))
                if mine is not None:
                    full[places] = mine
            else:
                full = form.zeros() if mine is None else mine.contiguous()
            getattr(whole, kind)[name] = processes.add_up_(full)
    return whole


class _Form:
    """The shape and dtype of a tensor, and where it is, for a process that has none of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device.type

    def zeros(self, first: int | None = None) -> Tensor:
        """Zeros of that form, with another first dimension if one is given."""
        shape = self.shape if first is None else (first, *self.shape[1:])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _joined(provenances: list[dict]) -> dict:
    """The provenance of all: fingerprints of the models, and numbers of samples and tokens, which are added up."""
    joined: dict = {}
    for provenance in provenances:
        for key, value in provenance.items():
            if isinstance(value, dict):
                joined[key] = _joined([joined.get(key, {}), value])
            else:
                joined[key] = joined[key] + value if key in joined and isinstance(value, int) else value
    return joined
