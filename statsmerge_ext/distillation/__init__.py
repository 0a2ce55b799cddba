"""Distillation: from the experts to a merge's coefficients, and from a model of one architecture to another."""

from statsmerge_ext.distillation.losses import feature_loss, pseudo_label_loss, soft_target_loss
from statsmerge_ext.distillation.teachers import LOSSES, ExpertTeachers

__all__ = ["LOSSES", "ExpertTeachers", "feature_loss", "pseudo_label_loss", "soft_target_loss"]
