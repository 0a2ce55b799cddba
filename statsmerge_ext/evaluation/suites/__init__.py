"""Task suites: a pretrained base, tasks with fixed heads, and an expert for each.

A suite is defined in one file (see vision8.py) and registered under its name.
"""

from statsmerge_ext.evaluation.suites.definition import SuiteDefinition, TrainingSettings
from statsmerge_ext.evaluation.suites.suite import Suite, Task, get_suite, list_suites, register_suite
from statsmerge_ext.evaluation.suites.text8 import text8
from statsmerge_ext.evaluation.suites.vision4 import vision4
from statsmerge_ext.evaluation.suites.vision8 import vision8
from statsmerge_ext.evaluation.suites.vit8 import vit8

register_suite(vision8)
register_suite(text8)
register_suite(vit8)
register_suite(vision4)

__all__ = [
    "Suite",
    "SuiteDefinition",
    "Task",
    "TrainingSettings",
    "get_suite",
    "list_suites",
    "register_suite",
]
