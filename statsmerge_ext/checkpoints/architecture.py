"""Checkpoints as models, for methods that have to run them; the one place that needs transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from statsmerge_ext.checkpoints.compatibility import check_finite, floating_names
from statsmerge_ext.checkpoints.reading import Checkpoint
from statsmerge_ext.errors import CheckpointError


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """The model that a Hugging Face directory describes, with its weights in float32 and in eval mode.

    The class is the first one that config.json names under "architectures". Nothing is downloaded and no code from
    the directory is run.

    Raises:
        CheckpointError: there is no configuration, transformers lacks the architecture, the file's tensors are not
            those of the model, or one holds NaN or infinity.
    """
    model_class = architecture(checkpoint)
    import transformers

    name = model_class.__name__
    state = {key: check_finite(key, tensor, checkpoint.file(key)) for key, tensor in checkpoint.items()}
    with quiet_transformers(transformers.utils.logging):
        try:
            config = configuration(checkpoint)
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{checkpoint.path}: transformers cannot build {name}: {error}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{checkpoint.path}: lacks tensor {min(info['missing_keys'])!r} of {name}")
    if info["unexpected_keys"]:
        raise CheckpointError(f"{checkpoint.path}: has tensor {min(info['unexpected_keys'])!r}, which {name} has not")
    return model.eval()


def architecture(checkpoint: Checkpoint) -> type[nn.Module]:
    """The class of transformers that config.json names. Raises CheckpointError as :func:`build_model`."""
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
    return model_class


def configuration(checkpoint: Checkpoint) -> object:
    """The parsed configuration of a directory that :func:`architecture` has a class for.

    The experts of a mixture are to be called one by one, so that it is seen which tokens each of them gets; and nothing
    is to be kept of earlier tokens, which would grow with the model's depth.
    """
    import transformers

    # Of the parsed content: an adapter's directory holds none of its own, and an expert's vocabulary may be the base's.
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    for part in (config, *(part for part in parts if part is not None)):
        part._experts_implementation, part.use_cache = "eager", False
    return config


def module_state(checkpoint: Checkpoint, model: nn.Module) -> Mapping[str, Tensor]:
    """The checkpoint's tensors under the names they have in `model`, an instance of its architecture.

    That is the checkpoint itself, read lazily, unless transformers renames, fuses or ignores tensors on loading.
    """
    known = model.state_dict().keys()
    return checkpoint if known >= set(floating_names(checkpoint)) else build_model(checkpoint).state_dict()


def stored_state(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict of `model` under the names, and in the shapes, that its class has in files."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # Before version 5 the names are the same.
        return state
    return revert_weight_conversion(model, dict(state))


@contextmanager
def quiet_transformers(logging) -> Iterator[None]:
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
