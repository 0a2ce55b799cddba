"""What a student loses against its teacher.

Outputs are [N, C], one row a sample, or [N, T, C], one row a token. All losses are means over the rows; of tokens, over
those that a mask [N, T] keeps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of ``values`` [N] or [N, T]; with a ``mask`` of that shape, weighted by it."""
    if mask is None:
        return values.mean()
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp_min(1)


def pseudo_label_loss(student: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of ``student`` logits [..., C] against the teacher's most likely classes [...]."""
    losses = F.cross_entropy(student.flatten(0, -2), labels.flatten(), reduction="none")
    return masked_mean(losses.view_as(labels), mask)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T² KL(teacher ‖ student) of the distributions softmax(logits / T); the factor keeps gradients of one size."""
    log_student = (student / temperature).log_softmax(-1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * masked_mean(divergence, mask)


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of features [..., d] over the teacher's own mean square: 1 for a student that gives zeros."""
    distance = (student - teacher).square().mean(-1)
    return masked_mean(distance, mask) / masked_mean(teacher.square().mean(-1), mask).clamp_min(1e-12)
