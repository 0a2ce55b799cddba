"""Rows of a comparison that are measured again, beside those that stay."""

from __future__ import annotations

import pytest
from results import joined

BEFORE = {
    "tasks": ["a", "b"],
    "seeds": 3,
    "samples": 64,
    "commits": {"base": "old", "experts": "old", "linear": "old", "lot": "old"},
    "rows": {"base": 1, "experts": 2, "linear": 3, "lot": 4},
}
NOW = BEFORE | {"commits": {"base": "new", "lot": "new", "ties": "new"}, "rows": {"base": 10, "lot": 40, "ties": 50}}


def test_new_rows_join_the_others_in_the_table_s_order():
    both = joined(BEFORE, NOW)
    assert list(both["rows"].items()) == [("base", 10), ("experts", 2), ("linear", 3), ("ties", 50), ("lot", 40)]
    assert both["commits"] == {"base": "new", "experts": "old", "linear": "old", "ties": "new", "lot": "new"}


@pytest.mark.parametrize("name, value", [("tasks", ["a"]), ("seeds", 1), ("samples", 8)])
def test_rows_that_do_not_compare(name, value):
    with pytest.raises(ValueError, match=f"{name}: .* were measured before, now"):
        joined(BEFORE, NOW | {name: value})
