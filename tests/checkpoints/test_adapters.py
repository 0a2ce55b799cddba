"""LoRA adapters as experts, merged in factored form, and extracted from models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from statsmerge_ext import run_merge
from statsmerge_ext.checkpoints import open_checkpoint, open_expert
from statsmerge_ext.cli import main
from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.lora import extract_adapter, merge_adapters
from tests.tiny_models import files_in, write_recipe

#: Weight of the base → shape; the last one is a convolution's.
SHAPES = {
    "enc.q.weight": (12, 8),
    "enc.v.weight": (6, 8),
    "embed_tokens.weight": (20, 8),
    "enc.q.bias": (12,),
    "conv.weight": (5, 3, 2, 2),
}


@pytest.fixture
def base(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert"}')
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def save_adapter(path: Path, *, rank: int = 3, seed: int = 0, extra=None, modules=("enc.q", "enc.v"), **config) -> dict:
    """An adapter with random factors; returns module → (A, B) in float64."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 5, "target_modules": list(modules), **config}
    (path / "adapter_config.json").write_text(json.dumps(content))
    tensors, factors = dict(extra or {}), {}
    for module in modules:
        out, into, *kernel = SHAPES[f"{module}.weight"]
        if config.get("fan_in_fan_out") or module == "embed_tokens":
            out, into = into, out
        a = torch.randn(rank, into, *kernel, generator=generator)
        b = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        kind, suffix = ("embedding_", "") if module == "embed_tokens" else ("", ".weight")
        tensors[f"base_model.model.{module}.lora_{kind}A{suffix}"] = a
        tensors[f"base_model.model.{module}.lora_{kind}B{suffix}"] = b
        factors[module] = (a.double(), b.double())
    save_file(tensors, path / "adapter_model.safetensors")
    return factors


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 5 / 3),
        ({"use_rslora": True}, 5 / math.sqrt(3)),
        ({"alpha_pattern": {"q|v": 9}}, 3),
        ({"alpha_pattern": {"other": 9}, "use_dora": False, "lora_bias": False}, 5 / 3),
    ],
)
def test_an_adapter_is_the_base_plus_its_scaled_product(tmp_path, base, config, scaling):
    factors = save_adapter(tmp_path / "lora", **config)
    state = open_checkpoint(base)
    expert = open_expert(tmp_path / "lora", state)
    assert set(expert) == set(SHAPES)
    for name in SHAPES:
        change = expert[name].double() - state[name].double()
        module = name.removesuffix(".weight")
        expected = scaling * factors[module][1] @ factors[module][0] if module in factors else torch.zeros(1)
        assert (change - expected).abs().max() <= 2e-6 * max(1, expected.abs().max())


def test_convolutions_embeddings_and_transposed_weights(tmp_path, base):
    state = open_checkpoint(base)
    a, b = save_adapter(tmp_path / "conv", modules=("conv",))["conv"]
    change = open_expert(tmp_path / "conv", state)["conv.weight"] - state["conv.weight"]
    expected = 5 / 3 * torch.einsum("orxy,rikl->oikl", b, a)
    torch.testing.assert_close(change.double(), expected, rtol=1e-5, atol=1e-5)
    a, b = save_adapter(tmp_path / "embed_tokens", modules=("embed_tokens",))["embed_tokens"]
    change = open_expert(tmp_path / "embed_tokens", state)["embed_tokens.weight"] - state["embed_tokens.weight"]
    torch.testing.assert_close(change.double(), 5 / 3 * (b @ a).T, rtol=1e-5, atol=1e-5)
    a, b = save_adapter(tmp_path / "turned", modules=("enc.q",), fan_in_fan_out=True)["enc.q"]
    change = open_expert(tmp_path / "turned", state)["enc.q.weight"] - state["enc.q.weight"]
    torch.testing.assert_close(change.double(), 5 / 3 * (b @ a).T, rtol=1e-5, atol=1e-5)


def test_whole_tensors_replace_the_base(tmp_path, base):
    saved = {"base_model.model.enc.q.bias": torch.ones(12)}
    save_adapter(tmp_path / "lora", extra=saved)
    assert torch.equal(open_expert(tmp_path / "lora", open_checkpoint(base))["enc.q.bias"], torch.ones(12))


def test_an_embedding_that_is_saved_beside_its_factors(tmp_path, base):
    """As PEFT does: the same as the base's it says nothing; another one is what the factors are added to."""
    state = open_checkpoint(base)
    key = "base_model.model.embed_tokens.base_layer.weight"
    for label, saved in (("same", state["embed_tokens.weight"]), ("other", torch.ones(20, 8))):
        factors = save_adapter(tmp_path / label, modules=("embed_tokens",), extra={key: saved.clone()})
        a, b = factors["embed_tokens"]
        expert = open_expert(tmp_path / label, state)
        expected = saved.double() + 5 / 3 * (b @ a).T
        torch.testing.assert_close(expert["embed_tokens.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    merge_adapters(write_recipe(tmp_path, experts=["same"]), tmp_path / "merged")
    with pytest.raises(CheckpointError, match="holds whole tensors besides factors"):
        merge_adapters(write_recipe(tmp_path, experts=["other"]), tmp_path / "refused")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is refused: DoRA rescales"),
        ({"lora_bias": True}, "lora_bias is refused"),
        ({"peft_type": "IA3"}, "is an adapter of type 'IA3', expected LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is refused"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is refused"),
        ({"lora_alpha": None}, "lora_alpha: expected a positive number, got None"),
        ({"fan_in_fan_out": True, "modules": ("enc.q",)}, None),
        ({"extra": {"base_model.model.enc.q.lora_magnitude_vector": torch.ones(12)}}, "is refused: DoRA"),
        ({"extra": {"base_model.model.gone.weight": torch.ones(2)}}, "adapts 'gone.weight', which the base lacks"),
        ({"extra": {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}}, "has one of the factors A and B only"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_a_reason(tmp_path, base, config, message):
    save_adapter(tmp_path / "lora", **config)
    if message is None:
        open_expert(tmp_path / "lora", open_checkpoint(base))
        return
    with pytest.raises(CheckpointError, match=message):
        open_expert(tmp_path / "lora", open_checkpoint(base))


def test_factors_of_another_shape_are_refused(tmp_path, base):
    save_adapter(tmp_path / "lora")
    other = {name: tensor[..., :-1].contiguous() for name, tensor in open_checkpoint(base).items()}
    with pytest.raises(CheckpointError, match=r"its factors make \[12, 8\], .* has shape \[12, 7\]"):
        open_expert(tmp_path / "lora", other)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_adapters_merge_in_factored_form_to_what_their_models_merge_to(tmp_path, base, method):
    save_adapter(tmp_path / "a", seed=1, modules=("enc.q", "enc.v", "conv", "embed_tokens"))
    save_adapter(tmp_path / "b", seed=2, rank=2, modules=("enc.q", "conv", "embed_tokens"), use_rslora=True)
    models = [{"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": 0.4}}]
    recipe = write_recipe(tmp_path, method, models=models)
    run_merge(recipe, tmp_path / "dense", progress=False)
    report = merge_adapters(recipe, tmp_path / "merged")
    dense, state = open_checkpoint(tmp_path / "dense"), open_checkpoint(base)
    factored = open_expert(tmp_path / "merged", state)
    assert report["rank"] == 5 and set(report["kept"].values()) == {1.0}
    for name in SHAPES:
        torch.testing.assert_close(factored[name], dense[name], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["rank_pattern"] == {"enc.v": 3}


def test_adapters_merged_by_rules_for_some_layers(tmp_path, base):
    save_adapter(tmp_path / "a", seed=1)
    save_adapter(tmp_path / "b", seed=2)
    rules = [
        {"filter": "enc.v", "merge_method": "keep"},
        {"filter": "enc.q", "merge_method": "linear", "parameters": {"weight": [0.2, 0.8]}},
    ]
    recipe = write_recipe(tmp_path, layers=rules)
    run_merge(recipe, tmp_path / "dense", progress=False)
    merge_adapters(recipe, tmp_path / "merged")
    dense, state = open_checkpoint(tmp_path / "dense"), open_checkpoint(base)
    factored = open_expert(tmp_path / "merged", state)
    assert torch.equal(factored["enc.v.weight"], state["enc.v.weight"])
    assert not torch.equal(dense["enc.q.weight"], state["enc.q.weight"])
    for name in SHAPES:
        torch.testing.assert_close(factored[name], dense[name], rtol=1e-5, atol=1e-5)
    rules[0]["merge_method"] = "ties"
    with pytest.raises(MethodError, match="method 'task_arithmetic' with its rules: its result is not the base plus"):
        merge_adapters(write_recipe(tmp_path, layers=rules), tmp_path / "out")


def test_a_lower_rank_is_the_best_approximation(tmp_path, base, capsys):
    save_adapter(tmp_path / "a", seed=1)
    save_adapter(tmp_path / "b", seed=2)
    recipe = write_recipe(tmp_path, parameters={"scaling_factor": 0.5})
    run_merge(recipe, tmp_path / "dense", progress=False)
    assert main(["lora", "merge", str(recipe), str(tmp_path / "merged"), "--rank", "2"]) == 0
    assert "2 modules, rank 2; kept of the norm of their changes: " in capsys.readouterr().out
    dense, state = open_checkpoint(tmp_path / "dense"), open_checkpoint(base)
    factored = open_expert(tmp_path / "merged", state)
    for name in ("enc.q.weight", "enc.v.weight"):
        u, s, vh = torch.linalg.svd((dense[name] - state[name]).double())
        best = (u[:, :2] * s[:2]) @ vh[:2]
        torch.testing.assert_close((factored[name] - state[name]).double(), best, rtol=1e-4, atol=1e-5)


def test_only_weighted_sums_have_factors(tmp_path, base):
    save_adapter(tmp_path / "a")
    with pytest.raises(MethodError, match="method 'ties': its result is not the base plus weighted task vectors"):
        merge_adapters(write_recipe(tmp_path, "ties", ["a"]), tmp_path / "out")
    save_file({n: t + 1 for n, t in open_checkpoint(base).items()}, tmp_path / "full.safetensors")
    with pytest.raises(CheckpointError, match="full.safetensors.*: is no LoRA adapter"):
        merge_adapters(write_recipe(tmp_path, experts=["full.safetensors"]), tmp_path / "out")
    with pytest.raises(MethodError, match="rank: expected at least 1, got 0"):
        merge_adapters(write_recipe(tmp_path, experts=["a"]), tmp_path / "out", rank=0)
    assert "out" not in files_in(tmp_path)


def test_an_adapter_is_extracted_from_a_model(tmp_path, base, capsys):
    state = dict(open_checkpoint(base))
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(12, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    full = torch.randn(6, 8, generator=generator)
    changed = {
        "enc.q.weight": low,
        "enc.v.weight": full,
        "enc.q.bias": torch.ones(12),
        "embed_tokens.weight": torch.ones(20, 8),
    }
    (tmp_path / "model").mkdir()
    model = {name: tensor + changed.get(name, 0) for name, tensor in state.items()}
    save_file(model, tmp_path / "model" / "model.safetensors")
    paths = [str(tmp_path / name) for name in ("base", "model", "lora")]
    assert main(["lora", "extract", *paths, "--rank", "2", "--quiet"]) == 0
    expert = open_expert(tmp_path / "lora", open_checkpoint(base))
    torch.testing.assert_close(expert["enc.q.weight"] - state["enc.q.weight"], low, rtol=1e-3, atol=1e-3)
    u, s, vh = torch.linalg.svd(full.double())
    error = (expert["enc.v.weight"] - state["enc.v.weight"] - full).double().norm()
    assert s[2:].norm() * 0.999 <= error <= s[2:].norm() * 1.002
    assert torch.equal(expert["enc.q.bias"], state["enc.q.bias"])

    assert main(["lora", "extract", *paths, "--rank", "2"]) == 2
    assert "lora: exists already" in capsys.readouterr().err
    report = extract_adapter(*paths, rank=3, overwrite=True)
    assert sorted(report["left_out"]) == ["embed_tokens.weight", "enc.q.bias"]
    with pytest.raises(CheckpointError, match="no matrix differs"):
        extract_adapter(base, base, tmp_path / "none", rank=2)
