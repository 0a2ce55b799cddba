"""Layers merged in execution order, on what the merged model itself feeds them.

The experts' forward passes and those of the merged model go through the layers in lockstep. When they have come to a
layer, it is merged (:mod:`~statsmerge_ext.engine.layer_by_layer`), its weights are replaced, and the passes go on. Each
layer runs once for every expert and once for the merged model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.dataflow import trace_dataflow
from statsmerge_ext.engine.layer_by_layer import LayerByLayer, Passes
from statsmerge_ext.engine.layer_evidence import Fit
from statsmerge_ext.engine.lockstep import Step, lockstep, sharing_copy
from statsmerge_ext.engine.problem import MergeProblem, Solution
from statsmerge_ext.engine.shared_evidence import shared_batches
from statsmerge_ext.engine.together import groups, join, one_sample

# Batches that are alike are run together up to so many samples: fewer passes to keep in step.
_SAMPLES_TOGETHER = 64


def merge_in_execution_order(
    problem: MergeProblem, fit: Fit, *, shifts: bool = True, surroundings: bool = True, feature_mix: float = 0.0
) -> Solution:
    """Merge by solving each layer with ``fit``, once all layers before it are merged.

    Linear layers, convolutions and the scales of norms are solved together with their biases. A BatchNorm with frozen
    statistics is one affine map with the layer before it, and a residual connection one target; both are found by
    :func:`~statsmerge_ext.engine.dataflow.trace_dataflow`. Without ``surroundings`` each layer is solved by itself,
    without ``shifts`` even each weight, and biases are the mean. The inputs that are fitted are the merged model's, or
    with a ``feature_mix`` α those and α of the way to the expert's own. Embeddings are means of the experts' rows
    weighted by token counts. All else starts and stays as the experts' mean: layers that are never called, bare
    parameters, the statistics of BatchNorm. Up to the first layer that some expert changed, everything is the base's
    own.

    Where the problem's layers are some of the model's, the others are what its base has, and the layers are solved
    around them: what the merged model makes of its input passes through them as they are. A BatchNorm whose scale or
    shift is not among the layers is no part of the layer before it. A bias that is not among them is there already
    when its weight is solved; one whose weight is not among them stays the experts' mean.

    A layer that is called several times in a forward pass is solved at each call from the sums over all calls so far:
    what comes after a call sees what was known then, and the last solution stands.

    Where the problem comes with forward passes, they are those of some layers of a model; otherwise of all of it.
    Several processes call this alike, each runs its share of the samples, and sums are added up at every layer.

    Raises what the forward passes raise, and ProcessError if another process has ended.
    """
    passes = problem.passes or _ModelPasses(problem)
    return LayerByLayer(problem, passes, fit, shifts, surroundings, feature_mix).run()


class _ModelPasses(Passes):
    """Passes through a model that is in memory, as are all experts."""

    def __init__(self, problem: MergeProblem) -> None:
        batches = [
            (name, join([of_expert[place] for place in places]))
            for name, of_expert in shared_batches(problem.batches).items()
            for places in groups(of_expert, _SAMPLES_TOGETHER)
        ]
        model = problem.model.eval()
        first = next(batch for of_expert in problem.batches.values() for batch in of_expert)
        layers = problem.model_layers
        super().__init__(batches, model, layers, trace_dataflow(model, layers, problem.forward, one_sample(first)))
        self._problem = problem
        self._experts = {name: _with_state(model, state) for name, state in problem.experts.items()}
        model.load_state_dict(merge_buffers(problem, self.parameters, reestimate=False), strict=False)

    def steps(self) -> Iterator[Step]:
        passes = [(self._experts[name], batch) for name, batch in self.batches]
        passes += [(self.merged, batch) for _, batch in self.batches]
        return lockstep(passes, self.layers, self._problem.forward)


def _with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` around the tensors of ``state``, which are not copied where dtype and device agree."""
    model = sharing_copy(model)
    tensors = {key: state[key].to(like) if key in state else like for key, like in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model
