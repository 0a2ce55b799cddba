"""The experts as teachers of the merged model, each on its own unlabelled batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from statsmerge_ext.distillation.losses import feature_loss, pseudo_label_loss, soft_target_loss
from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import CalibrationError, MethodError

LOSSES = ("cross_entropy", "kl", "features")

#: Where the models of transformers put an embedding, in the order in which it is looked for.
_FEATURE_FIELDS = ("image_embeds", "text_embeds", "pooler_output", "last_hidden_state")


class ExpertTeachers:
    """The loss of a merged model against each expert, whose own outputs are computed once.

    Args:
        problem: has the experts, their batches and heads. Logits may be [N, C] or, as of token classification and
            language models, [N, T, C]; padding is then left out by the batch's ``attention_mask``.
        loss: "cross_entropy" against the expert's most likely class; "kl" from its distribution; "features", the
            distance of what embedding models without a head put out.
        temperature: of both distributions in "kl".

    Raises:
        MethodError: an unknown loss, or a temperature that is not positive.
        CalibrationError: the model's outputs are not what the loss compares.
    """

    def __init__(self, problem: MergeProblem, loss: str, temperature: float = 1.0) -> None:
        if loss not in LOSSES:
            raise MethodError(f"loss: expected one of {LOSSES}, got {loss!r}")
        if not temperature > 0:
            raise MethodError(f"temperature: expected a positive number, got {temperature}")
        self._problem, self._loss, self._temperature = problem, loss, temperature
        self._targets: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for name, state in problem.experts.items():
                problem.model.load_state_dict(dict(state), strict=False)
                problem.model.eval()
                self._targets[name] = [
                    self._target(self.output(name, problem.forward(problem.model, batch)))
                    for batch in problem.batches[name]
                ]

    def output(self, name: str, output: object) -> Tensor:
        """What is compared: the logits (or features) that the model's ``output`` gives with the head of ``name``."""
        head = self._problem.heads.get(name)
        if self._loss != "features":
            return logits_of(head, output)
        if head is not None:
            return head(output)
        fields = (getattr(output, field, None) for field in _FEATURE_FIELDS)
        features = output if isinstance(output, Tensor) else next((f for f in fields if f is not None), None)
        if features is None or features.dim() < 2:
            raise CalibrationError(f"heads: loss 'features' finds no features [N, d] in a {type(output).__name__}")
        return features

    def loss(self, name: str, place: int, output: Tensor) -> Tensor:
        """The loss of ``output`` (from :meth:`output`) on batch number ``place`` of expert ``name``, a scalar."""
        target = self._targets[name][place]
        mask = token_mask(self._problem.batches[name][place], output)
        if self._loss == "cross_entropy":
            return pseudo_label_loss(output, target, mask)
        if self._loss == "kl":
            return soft_target_loss(output, target, self._temperature, mask)
        return feature_loss(output, target, mask)

    def _target(self, output: Tensor) -> Tensor:
        return output.argmax(-1) if self._loss == "cross_entropy" else output


def logits_of(head: object, output: object) -> Tensor:
    """``output`` of a model, through ``head`` if there is one, as logits [N, C] or [N, T, C].

    Raises CalibrationError if that is no tensor of at least two dimensions.
    """
    logits = head(output) if head is not None else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise CalibrationError(
            "heads: expected a head for every expert, or a model whose output is logits [N, C]; got "
            + (f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__)
        )
    return logits


def token_mask(batch: object, output: Tensor) -> Tensor | None:
    """The batch's attention mask [N, T] where ``output`` is [N, T, C]; None where every row of it counts."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if mask is not None and output.dim() == 3 and mask.shape == output.shape[:2] else None
