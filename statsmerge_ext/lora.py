"""Merging LoRA adapters into one adapter, and extracting an adapter from a model's task vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext import ops
from statsmerge_ext.checkpoints import check_compatible, open_checkpoint, save_state_dict
from statsmerge_ext.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, Factors, adapter_files, is_adapter
from statsmerge_ext.checkpoints.compatibility import TOKEN_TABLES
from statsmerge_ext.checkpoints.writing import atomic_output, check_output
from statsmerge_ext.engine.merging import solve
from statsmerge_ext.engine.streaming import Piece, Stream, layer_shape
from statsmerge_ext.errors import CheckpointError, MethodError
from statsmerge_ext.layers import layers_of_state
from statsmerge_ext.recipe import Recipe, load_recipe

#: Models of transformers whose linear layers are stored [in, out].
TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def merge_adapters(
    recipe: Recipe | str | Path, out: str | Path, *, rank: int | None = None, overwrite: bool = False
) -> dict:
    """Merge the adapters that a recipe names into one adapter, without ever forming a change of a weight.

    Σ_k λ_k s_k B_k A_k is the product of the concatenated factors. With Q_B R_B and Q_A R_A their QR factorisations,
    its singular values are those of the small R_B R_Aᵀ, exactly; the best approximation of a given rank follows.

    Args:
        recipe: a recipe, or its file; its experts are adapters of the base, its method one whose result is the base
            plus weighted task vectors.
        out: the directory to make.
        rank: the merged factors' rank; None: as high as the sum needs.
        overwrite: replace an existing adapter.

    Returns: {"rank", "modules", "kept": module → share of the Frobenius norm of its change that the factors keep}.

    Raises:
        CheckpointError: an expert is no adapter, or is refused; the output exists or cannot be written.
        MethodError: the method's result is no weighted sum; the rank is not positive.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    out = Path(out)
    _check(out, rank, overwrite)
    base = open_checkpoint(recipe.base)
    adapters = {}
    for name, path in recipe.experts.items():
        if not is_adapter(path):
            raise CheckpointError(f"expert {name!r} ({path}): is no LoRA adapter; expected a directory with {CONFIG}")
        adapters[name] = Adapter(path, base)
        if adapters[name].replaced:
            raise CheckpointError(
                f"{path}: holds whole tensors besides factors ({min(adapters[name].replaced.values())!r}); merge it "
                "into a full model instead"
            )
    if recipe.needs_data:
        raise MethodError(f"method {recipe.method!r} runs the model; merge the adapters into a full model instead")
    solved = solve(recipe.chosen, base=base, experts=recipe.experts, **recipe.hyperparameters)
    if not solved.solution.is_weighted_sum:
        rules = " with its rules" if recipe.layers else ""
        raise MethodError(
            f"method {recipe.method!r}{rules}: its result is not the base plus weighted task vectors, so it has no "
            "factors; merge into a full model, and extract an adapter from that"
        )
    table = solved.coefficients
    rows = dict(zip(table["names"], table["values"].tolist(), strict=True))
    merged, kept = {}, {}
    for weight in dict.fromkeys(weight for adapter in adapters.values() for weight in adapter.factors):
        parts = [
            (coefficient, adapter.factors[weight])
            for coefficient, adapter in zip(rows[weight], adapters.values(), strict=True)
            if weight in adapter.factors
        ]
        module = next(adapter.modules[weight] for adapter in adapters.values() if weight in adapter.factors)
        merged[module], kept[module] = combined(parts, rank)
    config = dict(next(iter(adapters.values())).config)
    _save(out, config, merged, recipe.out_dtype, overwrite)
    return {"rank": max(x.a.shape[0] for x in merged.values()), "modules": len(merged), "kept": kept}


def combined(parts: Iterable[tuple[float, Factors]], rank: int | None) -> tuple[Factors, float]:
    """Σ c · s B A of the ``parts`` as factors of at most the given rank, and the share of its norm that they keep."""
    parts = list(parts)
    first = parts[0][1]
    b = torch.cat([c * x.scaling * x.b.flatten(1).double() for c, x in parts], 1)
    a = torch.cat([x.a.flatten(1).double() for _, x in parts], 0)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    largest = s[0] if len(s) else 0
    needed = max(1, int((s > largest * torch.finfo(torch.float64).eps * max(r_b.shape)).sum()))
    rank = min(needed, rank or needed)
    root = s[:rank].sqrt()
    new_b, new_a = q_b @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_a.T
    share = float(s[:rank].norm() / s.norm()) if largest > 0 else 1.0
    shapes = (rank, *first.a.shape[1:]), (first.b.shape[0], rank, *first.b.shape[2:])
    factors = Factors(new_a.reshape(shapes[0]), new_b.reshape(shapes[1]), 1.0, first.embedding, first.transposed)
    return factors, share


def extract_adapter(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    rank: int,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: bool = False,
) -> dict:
    """The LoRA adapter of a given rank that is nearest to a model's task vector, by truncated singular values.

    Args:
        base, model: checkpoints; the model was fine-tuned from the base, or merged on it.
        out: the directory to make.
        rank: of the factors of every matrix, where it has so many.
        tolerance: relative error of the singular values.
        overwrite: replace an existing adapter.
        progress: show a progress bar.

    Returns: {"rank", "modules", "kept": module → share of the Frobenius norm of its change that the factors keep,
    "left_out": the changed tensors that an adapter has no factors for (vectors, embeddings, convolutions)}.

    Raises:
        CheckpointError: the model does not fit the base, nothing differs, or the output exists or cannot be written.
        MethodError: the rank is not positive.
    """
    out = Path(out)
    _check(out, rank, overwrite)
    base = open_checkpoint(base)
    model = check_compatible(base, {"model": open_checkpoint(model)})["model"]
    transposed = (base.config or {}).get("model_type") in TRANSPOSED_MODELS
    stream = Stream(base, [model], layers_of_state(base), whole=True)

    def factors(piece: Piece, of_base: Tensor, of_model: list[Tensor]) -> tuple[Factors, float] | bool:
        """Factors and what they keep of the norm; or whether a tensor that can have none has changed."""
        name, shape = piece.layer.parameter, layer_shape(base, piece.layer)
        if torch.equal(of_base, of_model[0]):
            return False
        if len(shape) != 2 or not name.endswith(".weight") or any(part in name for part in TOKEN_TABLES):
            return True
        before, after = of_base.view(shape), of_model[0].view(shape)
        found = ops.topk_svd([after], min(rank, *shape), minus=[before], tol=tolerance, vectors=True)
        root = found.S[0].sqrt()
        left, right = found.U[0] * root, root[:, None] * found.Vh[0]
        whole = (after.float() - before.float()).norm()
        # A module of transposed weights applies the transpose of B A.
        a, b = (left.T, right.T) if transposed else (right, left)
        return Factors(a, b, 1.0, False, transposed), float(found.S[0].norm() / whole)

    found, kept, left_out = {}, {}, []
    results = stream.results(factors)
    for piece, result in tqdm(results, "Extracting", len(stream.pieces), unit="tensor", disable=not progress):
        name = piece.layer.parameter
        if isinstance(result, tuple):
            module = "base_model.model." + name.removesuffix(".weight")
            found[module], kept[module] = result
        elif result:
            left_out.append(name)
    if not found:
        raise CheckpointError(f"{model.path}: no matrix differs from the base's, so there is nothing to extract")
    config = {"base_model_name_or_path": str(base.path), "fan_in_fan_out": transposed}
    _save(out, config, found, None, overwrite)
    return {"rank": rank, "modules": len(found), "kept": kept, "left_out": left_out}


def _check(out: Path, rank: int | None, overwrite: bool) -> None:
    if rank is not None and rank < 1:
        raise MethodError(f"rank: expected at least 1, got {rank}")
    if not (overwrite and is_adapter(out)):
        check_output(out, overwrite=False)


def _save(
    out: Path, config: Mapping[str, object], factors: Mapping[str, Factors], dtype: torch.dtype | None, overwrite: bool
) -> None:
    text, tensors = adapter_files(config, factors)
    dtype = dtype or torch.float32
    with atomic_output(out, overwrite=overwrite, directory=True) as temporary:
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        save_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, temporary / WEIGHTS[0])
