"""Merging methods: one file a method, each a registered function of the same shape."""

from statsmerge_ext.methods import (  # importing a method's module registers it
    adamerging,
    drift_compensation,
    layer_wise_anchor,
    linear,
    lot,
    regmean,
    stats_merging,
    task_arithmetic,
    ties,
)
from statsmerge_ext.methods.registry import Method, get_method, list_methods, register_method

__all__ = [
    "Method",
    "adamerging",
    "drift_compensation",
    "get_method",
    "linear",
    "list_methods",
    "layer_wise_anchor",
    "lot",
    "register_method",
    "regmean",
    "stats_merging",
    "task_arithmetic",
    "ties",
]
