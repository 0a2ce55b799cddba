"""What a recipe merges: its models, checked against each other, and the samples of its experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from statsmerge_ext.calibration import Batch, as_named
from statsmerge_ext.checkpoints import Checkpoint, check_compatible, open_checkpoint, open_expert
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.checkpoints.vocabulary import in_vocabulary_of
from statsmerge_ext.errors import CheckpointError, RecipeError
from statsmerge_ext.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a merge.

    Attributes:
        recipe: which names them.
        base: the base checkpoint.
        experts: name → checkpoint that fits the base, lazy.
        batches: expert → unlabelled batches, for methods that look at data; else None.
        vocabulary: of the experts that are seen through the base's vocabulary, numbers of tokens for the report.
    """

    recipe: Recipe
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    batches: Mapping[str, list[Batch]] | None
    vocabulary: Mapping[str, dict[str, int]]

    def identity(self) -> dict:
        """JSON-able facts that decide the result, as far as the inputs do; of models no tensor is read for them."""
        recipe, models = self.recipe, {"": self.base, **self.experts}
        return {
            **recipe.chosen.identity(recipe.hyperparameters),
            "out_dtype": str(recipe.out_dtype),
            "models": {name: model.identity() for name, model in models.items()},
            "batches": {name: fingerprint(as_named(batches)) for name, batches in (self.batches or {}).items()},
        }

    @property
    def bytes(self) -> int:
        """What the models' files take."""
        return sum(path.stat().st_size for model in self._models for path in model.files)

    def leave_page_cache(self) -> None:
        """Have what is read of the models leave the page cache soon after."""
        for model in self._models:
            model.leave_page_cache()

    @property
    def _models(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.experts.values())


def open_inputs(recipe: Recipe, device: str | torch.device) -> Inputs:
    """Open what ``recipe`` names; tensors are put on ``device`` when they are read.

    Raises:
        RecipeError: the output's tokenizer is not the one that its vocabulary will be.
        CheckpointError: a model cannot be read, or does not fit the base.
        CalibrationError: samples cannot be read.
    """
    if recipe.vocab == "common" and recipe.tokenizer is not None:
        raise RecipeError(f"vocab: 'common' gives the base's vocabulary, but the tokenizer is of {recipe.tokenizer}")
    base = open_checkpoint(recipe.base, device, at_least=recipe.out_dtype)
    experts = {name: open_expert(path, base, device) for name, path in recipe.experts.items()}
    experts, vocabulary = in_vocabulary_of(base, experts, common=recipe.vocab == "common")
    check_compatible(base, experts)
    batches = recipe.calibration.read(recipe.base, device) if recipe.calibration else None
    return Inputs(recipe, base, experts, batches, vocabulary)


def refuse_to_overwrite(out: Path, recipe: Recipe) -> None:
    """Raise CheckpointError for an output that is, or holds, a model that ``recipe`` merges."""
    for path in (recipe.base, *recipe.experts.values()):
        if path.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{out}: is or holds an input of the merge ({path}); choose another place")
