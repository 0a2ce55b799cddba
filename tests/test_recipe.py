"""Recipes: what is accepted, and that everything else is refused with file, line and the nearest known key."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch

from statsmerge_ext.engine.problem import MergeProblem
from statsmerge_ext.errors import MethodError, RecipeError
from statsmerge_ext.layers import layers_of_state
from statsmerge_ext.methods import LayerRule, get_method
from statsmerge_ext.methods.weights import Schedule, expert_weights
from statsmerge_ext.recipe import load_recipe, parse_recipe

BASE = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
  - model: b
"""
LOT = """\
merge_method: lot
base_model: base
models:
  - model: a
  - model: b
calibration:
  data: texts.txt
"""


def refusal(text):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml")
    return str(caught.value)


def test_smallest_recipe():
    recipe = parse_recipe(BASE)
    assert (recipe.method, recipe.base) == ("task_arithmetic", Path("base"))
    assert dict(recipe.experts) == {"a": Path("a"), "b": Path("b")}
    assert recipe.hyperparameters == {}
    assert recipe.out_dtype is recipe.calibration is None
    assert not recipe.needs_data


@pytest.mark.parametrize("page", ["README.md", "docs/recipe.md"])
def test_recipes_of_the_documentation_are_accepted(page):
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert examples and all(parse_recipe(example).experts for example in examples)


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text(
        BASE.replace("model: a", "model: ../other/a").replace("- model: b", "- model: /abs/b")
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.base == tmp_path / "base"
    assert dict(recipe.experts) == {"a": tmp_path.parent / "other" / "a", "b": Path("/abs/b")}
    assert recipe.text == (tmp_path / "r.yaml").read_text()


def test_weights_a_model_are_the_coefficients_as_in_mergekit():
    recipe = parse_recipe(
        """
        merge_method: task_arithmetic
        base_model: base
        models:
          - model: base
          - {model: a, parameters: {weight: 0.5}}
          - {model: b, parameters: {weight: 1e-3}}
        dtype: float32
        out_dtype: bfloat16
        tokenizer_source: base
        """
    )
    assert recipe.hyperparameters == {"weights": [0.5, 0.001], "scaling_factor": 1.0}
    assert recipe.out_dtype is torch.bfloat16
    assert list(recipe.experts) == ["a", "b"]


def test_lambda_and_shared_weights():
    recipe = parse_recipe(BASE + "parameters: {lambda: 0.7, weight: 0.5}\n")
    assert recipe.hyperparameters == {"scaling_factor": 0.7, "weights": 0.5}
    recipe = parse_recipe(
        BASE.replace("model: a", "{model: a, parameters: {weight: 2}}") + "parameters: {weight: 0.5}\n"
    )
    assert recipe.hyperparameters == {"weights": [2, 0.5], "scaling_factor": 1.0}


def test_one_value_for_a_hyperparameter_that_is_not_a_list():
    text = """
        merge_method: ties
        base_model: base
        models:
          - {model: a, parameters: {scaling_factor: 0.5, weight: 1}}
          - {model: b, parameters: {scaling_factor: %s, weight: 2}}
        """
    assert parse_recipe(text % 0.5).hyperparameters["scaling_factor"] == 0.5
    assert "takes one 'scaling_factor' for all models, got [0.5, 0.7]" in refusal(text % 0.7)


def test_linear_needs_no_base_and_counts_it_where_it_is_a_model():
    recipe = parse_recipe("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    assert recipe.base == Path("a")
    assert list(recipe.experts) == ["a", "b"]
    recipe = parse_recipe("merge_method: linear\nbase_model: a\nmodels: [{model: a}, {model: b}]\n")
    assert list(recipe.experts) == ["a", "b"]


def test_calibration():
    recipe = parse_recipe(LOT + "  samples: 16\n  batch_size: 4\n  max_length: 32\n  seed: 5\n", directory="/d")
    assert recipe.needs_data
    source = recipe.calibration
    assert dict(source.data) == {"a": Path("/d/texts.txt"), "b": Path("/d/texts.txt")}
    assert (source.samples, source.batch_size, source.max_length, source.seed) == (16, 4, 32, 5)
    recipe = parse_recipe(LOT.replace("texts.txt", "{b: b.txt, a: a.txt}"))
    assert dict(recipe.calibration.data) == {"a": Path("a.txt"), "b": Path("b.txt")}


def test_buffers_can_need_data_too():
    data = "calibration: {data: x.txt}\n"
    assert parse_recipe(BASE + "buffers: reestimate\n" + data).needs_data
    assert "calibration: missing" in refusal(BASE + "buffers: reestimate\n")
    assert "would have no effect: method 'task_arithmetic' looks at no data" in refusal(BASE + data)


def test_gradients_and_filters_as_in_mergekit():
    """The form of mergekit's own examples, memory settings included."""
    recipe = parse_recipe(
        """
        models:
          - model: one
            parameters:
              density: [1, 0.7, 0.1]
              weight: 1.0
          - model: two
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1]
          - model: three
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: [0.5, 1]
                - value: 0
        merge_method: ties
        base_model: base
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """
    )
    assert recipe.hyperparameters == {
        "normalize": True,
        "density": [Schedule((1, 0.7, 0.1)), 0.5, 0.33],
        "weights": [1.0, Schedule((0, 0.3, 0.7, 1)), Schedule((("mlp", (0.5, 1)), (None, 0)))],
        "scaling_factor": 1.0,
        "scope": "layer",
    }


def test_the_base_among_the_models_is_no_expert_whatever_its_parameters():
    recipe = parse_recipe(
        """
        merge_method: ties
        base_model: base
        models:
          - {model: base, parameters: {weight: [0, 1], density: 0.5}}
          - {model: b, parameters: {weight: 0.3, density: [1, 0.7]}}
        """
    )
    assert list(recipe.experts) == ["b"]
    assert recipe.hyperparameters["weights"] == [0.3]
    alone = BASE.replace("  - model: b\n", "").replace(": a", ": base")
    assert "models: holds no expert besides the base" in refusal(alone)


def test_rules_for_some_layers():
    recipe = parse_recipe(
        LOT
        + """\
parameters: {ridge: 0.001, lambda: 1.1}
layers:
  - {filter: classifier, merge_method: keep}
  - {filter: layers.11., parameters: {lambda: 1.5}}
  - {filter: embed, merge_method: task_arithmetic, parameters: {weight: [0.2, 0.3]}}
  - {filter: "*", merge_method: lot}
"""
    )
    assert recipe.hyperparameters == {"ridge": 0.001, "scaling_factor": 1.1}
    assert recipe.layers == (
        LayerRule("classifier", "keep"),
        LayerRule("layers.11.", "lot", {"ridge": 0.001, "scaling_factor": 1.5}),
        LayerRule("embed", "task_arithmetic", {"weights": [0.2, 0.3], "scaling_factor": 1.0}),
        LayerRule("*", "lot"),
    )
    assert recipe.chosen.name == "lot" and recipe.chosen.needs == {"grams"} and recipe.chosen.by_layer
    assert parse_recipe(BASE + "layers:\n").layers == ()


def test_a_rule_takes_over_what_the_models_themselves_say():
    models = BASE.replace("model: a", "{model: a, parameters: {weight: [0, 1]}}")
    models = models.replace("- model: b", "- {model: b, parameters: {weight: 0.3}}")
    rules = "layers: [{filter: head, parameters: {lambda: 2}}, {filter: mlp, parameters: {weight: 1}}]\n"
    weights = [Schedule((0, 1)), 0.3]
    assert [rule.hyperparameters for rule in parse_recipe(models + "parameters: {lambda: 0.5}\n" + rules).layers] == [
        {"weights": weights, "scaling_factor": 2},
        {"weights": 1, "scaling_factor": 0.5},
    ]


def test_rules_may_need_data_and_a_base_where_the_method_does_not():
    rules = "layers: [{filter: head, merge_method: lot}]\n"
    assert parse_recipe(BASE + rules + "calibration: {data: x.txt}\n").needs_data
    assert "calibration: missing; method 'lot' needs unlabelled samples" in refusal(BASE + rules)
    linear = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nlayers: [{filter: head, merge_method: %s}]\n"
    assert "base_model: missing; method 'keep'" in refusal(linear % "keep")
    assert parse_recipe((linear % "linear").replace("linear}", "linear, parameters: {weight: [0, 1]}}")).layers


@pytest.mark.parametrize("source", ["tokenizer_source: b", "tokenizer: {source: ./b}"])
def test_the_tokenizer_may_be_an_experts(source):
    assert parse_recipe(f"{BASE}{source}\n").tokenizer == Path("b")
    assert parse_recipe(f"{BASE}tokenizer_source: base\n").tokenizer is None


def test_schedules_over_layers():
    names = ["embed.weight", *(f"h.{i}.{part}.weight" for i in range(5) for part in ("mlp", "attn")), "norm.weight"]
    state = {name: torch.zeros(2) for name in names}
    experts = {"a": {name: torch.ones(2) for name in names}, "b": {name: torch.full((2,), 10.0) for name in names}}
    problem = MergeProblem(layers=layers_of_state(state), base=state, experts=experts)
    weights = [Schedule((0, 1, 3)), Schedule((("mlp", (0, 4)), (None, 7)))]
    table = expert_weights(weights, problem, 1.0)
    expected = [[0, 7]]
    for i in range(5):
        first = [0, 0.5, 1, 2, 3][i]
        expected += [[first, i], [first, 7]]
    torch.testing.assert_close(table, torch.tensor([*expected, [0, 7]], dtype=torch.float64))
    merged = get_method("task_arithmetic")(problem, weights=weights, scaling_factor=0.5).parameters
    assert torch.equal(merged["h.3.mlp.weight"], torch.full((2,), 0.5 * (2 * 1 + 3 * 10.0)))
    with pytest.raises(MethodError, match="weights: no filter of expert 1 fits 'embed.weight'"):
        expert_weights([1, Schedule((("mlp", 1),))], problem, 1.0)
    with pytest.raises(MethodError, match="needs the scope 'layer'"):
        get_method("ties")(problem, density=[Schedule((0.1, 0.9)), 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("base_model", "base_modle"), "r.yaml:2:1: base_modle: unknown key (did you mean 'base_model'?)"),
        (BASE + "slices: []\n", "r.yaml:6:1: slices: is not supported yet"),
        (
            BASE + "chat_template: chatml\n",
            "r.yaml:6:1: chat_template: expected 'auto' or a template in Jinja, got 'chatml'",
        ),
        (BASE + "chat_template: [1]\n", "r.yaml:6:1: chat_template: expected 'auto' or a template in Jinja, got [1]"),
        (BASE.replace("model: a", "modle: a"), "r.yaml:4:5: models[0].modle: unknown key (did you mean 'model'?)"),
        (
            BASE + "parameters:\n  scalling_factor: 0.3\n",
            "r.yaml:7:3: parameters.scalling_factor: method 'task_arithmetic' has no hyperparameter "
            "'scalling_factor' (did you mean 'scaling_factor'?)",
        ),
        (
            BASE.replace("- model: a", "- model: a\n    parameters:\n      wieght: 1"),
            "r.yaml:6:7: models[0].parameters.wieght: method 'task_arithmetic' has no hyperparameter 'wieght' "
            "(did you mean 'weight'?)",
        ),
        (LOT + "  sample: 3\n", "r.yaml:8:3: calibration.sample: unknown key (did you mean 'samples'?)"),
        (
            LOT.replace("texts.txt", "{a: x, bb: x}"),
            "r.yaml:7:16: calibration.data.bb: unknown key (did you mean 'b'?)",
        ),
        (
            BASE.replace("task_arithmetic", "task_aritmetic"),
            "r.yaml:1:1: merge_method: unknown method 'task_aritmetic'",
        ),
        (
            BASE + "layers:\n  - filter: head\n    method: keep\n",
            "r.yaml:8:5: layers[0].method: unknown key (did you mean 'merge_method'?)",
        ),
        (
            BASE + "layers:\n  - filter: head\n    merge_method: kepe\n",
            "r.yaml:8:5: layers[0].merge_method: unknown method 'kepe' (did you mean 'keep'?)",
        ),
        (
            BASE + "layers:\n  - filter: head\n    parameters: {lamda: 1}\n",
            "r.yaml:8:18: layers[0].parameters.lamda: method 'task_arithmetic' has no hyperparameter 'lamda' "
            "(did you mean 'lambda'?)",
        ),
    ],
)
def test_typos_are_refused_with_line_and_nearest_key(text, message):
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: expected a mapping (key: value), got nothing"),
        ("- a\n", "r.yaml:1:1: expected a mapping (key: value), got a list"),
        ("merge_method: [x\n", "r.yaml:2:1: is not YAML: "),
        ("a: \x00\n", "r.yaml: is not YAML: unacceptable character"),
        ("a: 2001-99-99\n", "r.yaml: is not YAML: "),
        ("a: &x [*x]\n", "r.yaml:1:1: a: unknown key"),
        ("a: !!python/object/apply:os.system [x]\n", "r.yaml:1:4: is not YAML: "),
        (BASE + "models: []\n", "r.yaml:6:1: models: appears twice"),
        (BASE + "3: x\n", "r.yaml:1:1: expected texts for keys, got 3"),
        ("base_model: x\n", "r.yaml:1:1: merge_method: missing"),
        ("merge_method: lot\nbase_model: x\n", "r.yaml:1:1: models: expected a list of at least one expert"),
        (
            "merge_method: lot\nbase_model: x\nmodels: []\n",
            "r.yaml:3:1: models: expected a list of at least one expert",
        ),
        ("merge_method: ties\nbase_model: x\nmodels: [{model: x}]\n", "r.yaml:3:1: models: holds no expert besides"),
        (BASE.replace("base_model: base\n", ""), "r.yaml:1:1: base_model: missing; method 'task_arithmetic'"),
        (BASE.replace("base_model: base", "base_model: 3"), "r.yaml:2:1: base_model: expected a text, got 3"),
        (BASE.replace("model: b", "model: ./a"), "r.yaml:5:5: models[1]: the same model as models[0]"),
        (BASE.replace("model: b", "model: other/a"), "r.yaml:5:5: models[1]: has the same name 'a' as models[0]"),
        (BASE.replace("- model: a", "- a"), "r.yaml:4:5: models[0]: expected a mapping"),
        (BASE.replace("- model: a", "- name: a"), "r.yaml:4:5: models[0]: model: missing"),
        (BASE + "dtype: float8\n", "r.yaml:6:1: dtype: got 'float8', expected one of float64, float32"),
        (BASE + "buffers: drop\n", "r.yaml:6:1: buffers: got 'drop', expected one of average, reestimate"),
        (BASE + "tokenizer_source: union\n", "r.yaml:6:1: tokenizer_source: expected 'base' or one of the"),
        (
            BASE + "tokenizer: {source: c}\n",
            "r.yaml:6:13: tokenizer.source: expected 'base' or one of the models (a, b)",
        ),
        (
            BASE + "parameters: {scaling_factor: big}\n",
            "r.yaml:6:14: parameters.scaling_factor: expected float, got 'big'",
        ),
        (
            BASE + "parameters: {scaling_factor: true}\n",
            "r.yaml:6:14: parameters.scaling_factor: expected float, got True",
        ),
        (BASE + "parameters: {weights: [1, x]}\n", "r.yaml:6:14: parameters.weights: expected float | Sequence[float]"),
        (BASE + "parameters: {weight: 1, weights: 2}\n", "r.yaml:6:25: parameters.weights: 'weights' is given twice"),
        (BASE + "parameters: {lambda: {value: 1}}\n", "r.yaml:6:14: parameters.lambda: filters are taken from"),
        (BASE + "parameters: 3\n", "r.yaml:6:1: parameters: expected a mapping"),
        (
            BASE.replace("model: a", "{model: a, parameters: {weight: [0, x]}}"),
            "r.yaml:4:38: models[0].parameters.weight[0]: expected a mapping",
        ),
        (
            BASE.replace("model: a", "{model: a, parameters: {weight: []}}"),
            "r.yaml:4:29: models[0].parameters.weight: expected a number, a gradient (list of numbers) or filters",
        ),
        (
            BASE.replace("model: a", "{model: a, parameters: {weight: [{filter: mlp}]}}"),
            "r.yaml:4:38: models[0].parameters.weight[0]: value: missing",
        ),
        (
            BASE.replace("model: a", "{model: a, parameters: {scaling_factor: [0, 1]}}"),
            "r.yaml:4:29: models[0].parameters.scaling_factor: expected a number, got [0, 1]",
        ),
        (
            BASE.replace("model: a", "{model: a, parameters: {weight: 1}}"),
            "r.yaml:5:5: models[1]: parameters.weight: missing; other models have it",
        ),
        (BASE + "layers: []\n", "r.yaml:6:1: layers: expected a list of at least one rule (- filter: PART)"),
        (BASE + "layers: [keep]\n", "r.yaml:6:10: layers[0]: expected a mapping"),
        (BASE + "layers: [{merge_method: keep}]\n", "r.yaml:6:10: layers[0]: filter: missing"),
        (BASE + "layers: [{filter: 3}]\n", "r.yaml:6:11: layers[0].filter: expected a text, got 3"),
        (BASE + "layers: [{filter: head}]\n", "r.yaml:6:10: layers[0]: would have no effect: expected a merge_method"),
        (
            BASE + "layers: [{filter: head, parameters: {lambda: [1]}}]\n",
            "r.yaml:6:38: layers[0].parameters.lambda: expected float, got a list",
        ),
        (
            BASE
            + "layers: [{filter: a, merge_method: featcal}, {filter: b, merge_method: esm}]\ncalibration: {data: x}\n",
            "r.yaml:6:1: layers: 'featcal' and 'esm' both run the model, which one method of a merge can",
        ),
        (
            BASE + "layers: [{filter: head, merge_method: keep}]\ncalibration: {data: x}\n",
            "r.yaml:7:1: calibration: would have no effect: the methods task_arithmetic, keep look at no data",
        ),
        (LOT + "  samples: 0\n", "r.yaml:8:3: calibration.samples: expected an integer of at least 1, got 0"),
        (LOT + "  batch_size: 2.5\n", "r.yaml:8:3: calibration.batch_size: expected an integer of at least 1, got 2.5"),
        (LOT + "  seed: x\n", "r.yaml:8:3: calibration.seed: expected int, got 'x'"),
        (LOT.replace("texts.txt", "{a: x}"), "r.yaml:7:3: calibration.data: no samples for the experts b"),
        (LOT.replace("data: texts.txt", "samples: 3"), "r.yaml:6:1: calibration: data: missing"),
        (LOT[: LOT.index("calibration")], "r.yaml:1:1: calibration: missing; method 'lot' needs unlabelled samples"),
    ],
)
def test_malformed_recipes_are_refused(text, message):
    assert refusal(text).startswith(message)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match="none.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="r.yaml: is not a text file"):
        load_recipe(tmp_path / "r.yaml")


def test_hyperparameters_are_checked_against_annotations():
    from statsmerge_ext.located_yaml import _fits

    assert isinstance(float | None, types.UnionType)
    assert _fits(None, float | None) and _fits(1, float | None) and not _fits("x", float | None)
    assert _fits(True, bool) and not _fits(1, bool) and not _fits(True, int)
    assert _fits([1, 2.5], list[float]) and not _fits([1, "x"], list[float]) and not _fits(1, list[float])
    assert _fits({}, dict) and _fits("x", None)
