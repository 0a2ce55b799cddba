"""vision4: vision8's base and four image tasks that no choice of the package was made on: letters, figures, terrain."""

from __future__ import annotations

from statsmerge_ext.evaluation.datasets import drawings, glyphs
from statsmerge_ext.evaluation.suites.definition import SuiteDefinition
from statsmerge_ext.evaluation.suites.vision8 import vision8

vision4 = SuiteDefinition(
    name="vision4",
    datasets=(glyphs.hebrew, glyphs.arabic, drawings.units, drawings.terrain),
    load_base=vision8.load_base,
    forward=vision8.forward,
    encode=vision8.encode,
    training=vision8.training,
    tuned_on=vision8.name,
)
