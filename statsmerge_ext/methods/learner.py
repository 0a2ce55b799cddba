"""The learner of StatsMerging: statistics of weights in, merging coefficients out; and how it is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.evidence import WeightStatistics

FORMAT = "statsmerge-learner-1"


class StatsMergeLearner(nn.Module):
    """Two-layer perceptron from features of statistics [L, K, F] (or [K, F]) to coefficients [L, K] (or [K]).

    Its last layer starts small, so that every coefficient starts near ``init_values``.

    Args:
        features: F.
        hidden: width of the hidden layer.
        init_values: the coefficient to start from.
        layers: None for one perceptron that all layers share, or L for one a layer.
    """

    def __init__(self, features: int, hidden: int = 256, init_values: float = 0.3, layers: int | None = None) -> None:
        super().__init__()
        copies = () if layers is None else (layers,)
        bound = features**-0.5  # as torch.nn.Linear starts
        self.hidden_weight = nn.Parameter(torch.empty(*copies, features, hidden).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.empty(*copies, 1, hidden).uniform_(-bound, bound))
        self.weight = nn.Parameter(torch.empty(*copies, hidden, 1).normal_(std=1e-3 / hidden**0.5))
        self.bias = nn.Parameter(torch.full((*copies, 1, 1), init_values))

    def forward(self, features: Tensor) -> Tensor:
        hidden = (features @ self.hidden_weight + self.hidden_bias).relu()
        return (hidden @ self.weight + self.bias).squeeze(-1)


@dataclass(frozen=True)
class Normalisation:
    """How statistics [..., K, 3 + r] (mean, variance, norm, singular values) become features [..., K, 2 (3 + r)].

    All but the mean are positive and spread over decades, so their logarithm is taken. Each is then standardised
    twice: by the centre and spread that it had over all layers and experts of the models the learner was trained on,
    which tells layers apart, and over the experts of its own layer, which tells experts apart whose weights hardly
    differ.

    Attributes:
        floor: smallest positive value whose logarithm is taken.
        centre, spread: [3 + r] of the logarithms (of the mean itself).
        columns: which of the 3 + r statistics are looked at.
    """

    floor: float
    centre: list[float]
    spread: list[float]
    columns: list[int]

    @classmethod
    def of(cls, values: Tensor, columns: list[int] | None = None) -> Normalisation:
        """That of the training models' statistics ``values`` [..., K, 3 + r]."""
        values = values.double()
        floor = float(values[..., 1:].abs().amax().clamp_min(1e-30)) * 1e-12
        logarithms = _logarithms(values, floor).flatten(0, -2)
        centre = logarithms.mean(0)
        spread = (logarithms - centre).square().mean(0).sqrt()
        chosen = list(range(values.shape[-1])) if columns is None else columns
        return cls(floor, centre.tolist(), spread.tolist(), chosen)

    def __call__(self, values: Tensor) -> Tensor:
        """The features of ``values`` [..., K, 3 + r], float32."""
        logarithms = _logarithms(values.double(), self.floor)
        centre, spread = torch.tensor(self.centre).double(), torch.tensor(self.spread).double()
        everywhere = _standardise(logarithms - centre, spread)
        within = logarithms - logarithms.mean(-2, keepdim=True)
        within_layer = _standardise(within, within.square().mean(-2, keepdim=True).sqrt())
        return torch.cat([everywhere[..., self.columns], within_layer[..., self.columns]], -1).float()


@dataclass
class FittedLearner:
    """A trained learner with all it takes to apply it to other models, tasks and experts: no data is needed for that.

    Attributes:
        network: the trained perceptron.
        normalisation: of the statistics it was trained on.
        of, r: what the statistics are of, and how many singular values they hold.
        granularity: "layer" or "task".
        space: what the coefficients weigh, "task_vectors" or "weights".
        softmax: whether the outputs pass through a softmax over the experts.
        layers: names of the layers that have a perceptron of their own; None where all share one.
    """

    network: StatsMergeLearner
    normalisation: Normalisation
    of: str
    r: int
    granularity: str
    space: str
    softmax: bool
    layers: list[str] | None = None

    def features(self, statistics: WeightStatistics) -> Tensor:
        """What the network sees of models: [L, K, F], or [K, F] for the granularity "task".

        Raises MethodError for statistics of another kind, or of other layers, than it was trained on.
        """
        if self.layers is not None and self.layers != statistics.layers:
            raise MethodError(
                f"statistics: the learner has a perceptron for each of {len(self.layers)} layers, {self.layers[0]!r} "
                f"to {self.layers[-1]!r}, and the models have {len(statistics.layers)}; a shared one fits any models"
            )
        if statistics.of != self.of or statistics.values.shape[-1] != 3 + self.r:
            got = f"{statistics.of!r} with r = {statistics.values.shape[-1] - 3}"
            raise MethodError(f"statistics: the learner expects those of {self.of!r} with r = {self.r}, got {got}")
        return self.normalisation(statistics.values if self.granularity == "layer" else statistics.model_wise())

    def coefficients(self, features: Tensor) -> Tensor:
        """λ [L, K] or [K] for :meth:`features`, differentiable in the network's parameters."""
        outputs = self.network(features)
        return outputs.softmax(-1) if self.softmax else outputs

    def to_json(self) -> str:
        """Everything, as text."""
        facts = {name: getattr(self, name) for name in ("of", "r", "granularity", "space", "softmax", "layers")}
        network = {name: tensor.tolist() for name, tensor in self.network.state_dict().items()}
        content = {"format": FORMAT, **facts, "normalisation": asdict(self.normalisation), "network": network}
        return json.dumps(content) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> FittedLearner:
        """Read a file of :meth:`to_json`. Raises CheckpointError for one that is missing, damaged or something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            state = {name: torch.tensor(values) for name, values in content.pop("network").items()}
            *copies, features, hidden = state["hidden_weight"].shape
            network = StatsMergeLearner(features, hidden, layers=copies[0] if copies else None)
            network.load_state_dict(state)
            return cls(network, Normalisation(**content.pop("normalisation")), **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be read as a StatsMerging learner: {error}") from error


def _logarithms(values: Tensor, floor: float) -> Tensor:
    return torch.cat([values[..., :1], values[..., 1:].clamp_min(floor).log()], -1)


def _standardise(centred: Tensor, spread: Tensor) -> Tensor:
    return torch.where(spread > 1e-12, centred / spread.clamp_min(1e-12), 0)
