"""The files beside the weights of a merged model: model card, recipe, coefficients and report."""

from __future__ import annotations

import json

import yaml

from statsmerge_ext.recipe import Recipe

REPORT = "merge_report.json"
CARD = """---
{front_matter}---
# {title}

{experts} merged into **{base}** by the method `{method}` of statsmerge_ext.

| setting | value |
| --- | --- |
{settings}

## Recipe

```yaml
{recipe}
```

`recipe.yaml` is the same recipe as a file, `merge_report.json` says what was done{coefficients}{learner}.
"""


def accompanying_files(
    recipe: Recipe, report: dict, coefficients: dict | None, learner: object | None = None
) -> dict[str, str]:
    """File name → text.

    Args:
        recipe: what was asked for.
        report: what was done, JSON-able.
        coefficients: {"names": layers, "tasks": experts, "values": Tensor [L, K]}, or None for methods without.
        learner: what the method learned, with a ``to_json`` method; None for methods without.
    """
    files = {
        "README.md": _card(recipe, report, coefficients is not None, learner is not None),
        "recipe.yaml": recipe.text,
        REPORT: json.dumps(report, indent=2) + "\n",
    }
    if coefficients is not None:
        values = coefficients["values"].tolist()
        files["coefficients.json"] = json.dumps({**coefficients, "values": values}, indent=2) + "\n"
    if learner is not None:
        files["learner.json"] = learner.to_json()
    return files


def _card(recipe: Recipe, report: dict, has_coefficients: bool, has_learner: bool) -> str:
    front_matter = {
        "base_model": recipe.base.name,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "statsmerge"],
    }
    settings = dict(report.get("hyperparameters", recipe.hyperparameters))
    for rule in recipe.layers:
        own = ", ".join(f"{name} {value}" for name, value in rule.hyperparameters.items())
        settings[f"layers with {rule.filter!r}"] = f"{rule.method}{': ' if own else ''}{own}"
    return CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=f"{recipe.base.name} merged by {recipe.method}",
        experts=", ".join(f"**{name}**" for name in recipe.experts),
        base=recipe.base.name,
        method=recipe.method,
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        recipe=recipe.text.strip(),
        coefficients=", `coefficients.json` holds the weight of each layer and expert" if has_coefficients else "",
        learner=", `learner.json` predicts such weights for other experts" if has_learner else "",
    )
