"""What a merge is decided from: Gram matrices of layer inputs and statistics of weights.

Both are artefacts: collected once, saved as safetensors with their provenance, and used by many merges.
"""

from statsmerge_ext.evidence.grams import GramEvidence, collect_grams
from statsmerge_ext.evidence.statistics import WeightStatistics, collect_weight_statistics

__all__ = ["GramEvidence", "WeightStatistics", "collect_grams", "collect_weight_statistics"]
