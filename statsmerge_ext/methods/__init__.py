"""Merging methods: one file a method, each a registered function of the same shape."""

from statsmerge_ext.methods import (  # importing a method's module registers it
    adamerging,
    dare,
    drift_compensation,
    iso_c,
    layer_wise_anchor,
    linear,
    lot,
    regmean,
    regmean_plus_plus,
    stats_merging,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
)
from statsmerge_ext.methods.registry import Method, get_method, list_methods, register_method

__all__ = [
    "Method",
    "adamerging",
    "dare",
    "drift_compensation",
    "get_method",
    "iso_c",
    "linear",
    "list_methods",
    "layer_wise_anchor",
    "lot",
    "register_method",
    "regmean",
    "regmean_plus_plus",
    "stats_merging",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]
