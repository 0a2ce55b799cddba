"""Weight statistics: what StatsMerging's learner looks at.

S = [mean, biased variance, L2 norm, σ_1 … σ_r] of each layer of each expert (StatsMerging, arXiv 2506.04567): no data
is needed to compute them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.streaming import Piece, Stream, layer_shape
from statsmerge_ext.evidence.artefact import load_artefact, save_artefact
from statsmerge_ext.layers import Layer

FORMAT = "statsmerge-statistics-1"
#: What the statistics can be of: the expert's own weights θ_k (the paper), or its task vector θ_k − θ_0.
SUBJECTS = ("weights", "task_vectors")


@dataclass
class WeightStatistics:
    """The statistics of K experts' layers.

    Attributes:
        layers, experts: names, in the order of ``values``.
        sizes: number of elements of each layer.
        of: "weights" or "task_vectors".
        values: [L, K, 3 + r] float64: mean, biased variance, L2 norm, and the r largest singular values, zero where
            a layer has fewer.
    """

    layers: list[str]
    experts: list[str]
    sizes: list[int]
    of: str
    values: Tensor

    def model_wise(self) -> Tensor:
        """The same numbers over whole models, [K, 3 + r]; the singular values are means over the layers."""
        mean, variance, norm = self.values[:, :, :3].unbind(2)
        share = torch.tensor(self.sizes, dtype=mean.dtype).unsqueeze(1) / sum(self.sizes)
        overall = (share * mean).sum(0)
        spread = (share * (variance + mean.square())).sum(0) - overall.square()
        whole = torch.stack([overall, spread, norm.square().sum(0).sqrt()], 1)
        return torch.cat([whole, self.values[:, :, 3:].mean(0)], 1)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically. Raises CheckpointError when it cannot be written."""
        facts = {"layers": self.layers, "experts": self.experts, "sizes": self.sizes, "of": self.of}
        save_artefact(path, FORMAT, {"values": self.values}, facts)

    @classmethod
    def load(cls, path: str | Path) -> WeightStatistics:
        """Read what :meth:`save` wrote. Raises CheckpointError for an unreadable file and CalibrationError for a
        readable one that holds something else."""
        file, facts = load_artefact(path, FORMAT)
        return cls(**facts, values=file["values"])


def collect_weight_statistics(
    layers: list[Layer],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    of: str = "weights",
    r: int = 3,
    progress: bool = False,
) -> WeightStatistics:
    """The statistics of every layer of every expert; layers are read ahead, and shared out to all processes.

    Args:
        layers: layers to look at; a convolution's weight counts as the matrix [out, in · kernel].
        base, experts: state dicts.
        of: "weights" (the paper's text) or "task_vectors" (its code).
        r: number of singular values.

    Raises:
        ValueError: ``of`` is neither of the two.
    """
    if of not in SUBJECTS:
        raise ValueError(f"of: expected one of {SUBJECTS}, got {of!r}")
    stream = Stream(base, experts.values(), layers, whole=True)
    sizes = [piece.count for piece in stream.pieces]
    mine = processes.share(range(len(layers)), sizes)
    values = torch.zeros(len(layers), len(experts), 3 + r, dtype=torch.float64)

    def statistics(piece: Piece, of_base: Tensor, of_experts: list[Tensor]) -> Tensor:
        shape = layer_shape(base, piece.layer)
        minus = [of_base.view(shape)] * len(of_experts) if of == "task_vectors" else None
        return ops.weight_statistics([part.view(shape) for part in of_experts], r, minus=minus)

    results = stream.results(statistics, [stream.pieces[place] for place in mine])
    bar = tqdm(results, desc="Weight statistics", total=len(mine), unit="layer", disable=not progress)
    for place, (_, of_layer) in zip(mine, bar):
        values[place] = of_layer
    names = [layer.name for layer in layers]
    return WeightStatistics(names, list(experts), sizes, of, processes.add_up_(values))
