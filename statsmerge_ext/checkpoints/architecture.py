"""Building the model of a checkpoint, for methods that have to run it; the one place that needs transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from statsmerge_ext.checkpoints.compatibility import floating_names
from statsmerge_ext.checkpoints.reading import Checkpoint
from statsmerge_ext.errors import CheckpointError


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """The model that a Hugging Face directory describes, with its weights in float32 and in eval mode.

    The class is the first one that config.json names under "architectures". Nothing is downloaded and no code from
    the directory is run.

    Raises:
        CheckpointError: there is no configuration, transformers lacks the architecture, or the file's tensors are not
            those of the model.
    """
    if checkpoint.config is None:
        raise CheckpointError(
            f"{checkpoint.path}: a method that runs the model needs a Hugging Face directory with config.json"
        )
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"{checkpoint.path}: running the model needs the transformers package") from error

    name = next(iter(checkpoint.config.get("architectures") or []), None)
    model_class = getattr(transformers, str(name), None)
    if model_class is None:
        raise CheckpointError(f"{checkpoint.path}/config.json: transformers has no architecture {name!r}")
    with _quiet(transformers.utils.logging):
        try:
            config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=dict(checkpoint), dtype=torch.float32, output_loading_info=True
            )
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{checkpoint.path}: transformers cannot build {name}: {error}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{checkpoint.path}: lacks tensors of {name}: {', '.join(sorted(info['missing_keys']))}")
    foreign = sorted(set(floating_names(checkpoint)) - set(model.state_dict()))
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {foreign[0]!r} is not one of {name} under that name; "
            "save the checkpoint with save_pretrained of this version of transformers"
        )
    return model.eval()


@contextmanager
def _quiet(logging) -> Iterator[None]:
    """transformers' loading report and progress bar off; what matters in them is raised as an error."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
