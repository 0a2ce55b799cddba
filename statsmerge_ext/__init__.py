"""Merge models that were fine-tuned from one pretrained model into a single one that does all their tasks."""

from statsmerge_ext.engine.merging import MergeResult, merge
from statsmerge_ext.methods import LayerRule
from statsmerge_ext.run import run_merge

__version__ = "0.1.0"
__all__ = ["LayerRule", "MergeResult", "__version__", "merge", "run_merge"]
