"""Checkpoints on disk: reading them lazily, checking that experts fit their base, writing results atomically."""

from statsmerge_ext.checkpoints.compatibility import check_compatible, check_finite
from statsmerge_ext.checkpoints.quantizing import quantize_expert, quantize_experts
from statsmerge_ext.checkpoints.reading import Checkpoint, open_checkpoint
from statsmerge_ext.checkpoints.task_vectors import open_expert
from statsmerge_ext.checkpoints.writing import save_hf_directory, save_state_dict

__all__ = [
    "Checkpoint",
    "check_compatible",
    "check_finite",
    "open_checkpoint",
    "open_expert",
    "quantize_expert",
    "quantize_experts",
    "save_hf_directory",
    "save_state_dict",
]
