"""`statsmerge distill`: a teacher and a student on disk, a trained student back on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from statsmerge_ext.calibration import Batch, as_named, read_samples
from statsmerge_ext.checkpoints import open_checkpoint, save_hf_directory
from statsmerge_ext.checkpoints.architecture import build_model, stored_state
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.checkpoints.writing import check_output
from statsmerge_ext.distillation.student import StudentTraining, distill
from statsmerge_ext.engine.journal import Journal


def run_distillation(
    teacher: str | os.PathLike,
    student: str | os.PathLike,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    training: StudentTraining = StudentTraining(),
    samples: int | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> dict:
    """Distil a checkpoint into one of another architecture and write the student, whole or not at all.

    Classes are matched by the names in the configurations (id2label).

    Args:
        teacher, student: Hugging Face directories of classifiers; the student is of the architecture to be merged.
        data: unlabelled samples, in any form that calibration data may have. Texts are tokenised by each model's own
            tokenizer.
        out: the Hugging Face directory to make, with ``distillation_report.json``.
        training: loss and optimiser.
        samples, batch_size, max_length, seed: as for calibration data; ``samples`` None: 64, or all if there are fewer.
        overwrite: replace an existing model.
        resume: take up an interrupted run where ``<out>.journal`` says it was, with the same result.
        progress: show progress bars.

    Returns:
        the report (JSON-able).

    Raises:
        StatsMergeError: says what is wrong; no partial output is left.
    """
    out = Path(out)
    check_output(out, overwrite)
    checkpoints = {"teacher": open_checkpoint(teacher), "student": open_checkpoint(student)}
    models = {name: build_model(checkpoint) for name, checkpoint in checkpoints.items()}
    options = {"samples": samples, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    batches = {name: read_samples(data, tokenizer=c.path, **options) for name, c in checkpoints.items()}
    journal_path = out.with_name(out.name + ".journal")
    if not resume:
        journal_path.unlink(missing_ok=True)
    identity = {
        "models": [fingerprint(checkpoint) for checkpoint in checkpoints.values()],
        "training": repr(training),
        "batches": fingerprint(as_named(batches["teacher"])),
        "order": seed,
    }
    journal = Journal(journal_path, identity)
    trained, facts = distill(
        models["teacher"],
        models["student"],
        batches["teacher"],
        student_batches=batches["student"],
        training=training,
        teacher_classes=_classes(models["teacher"]),
        student_classes=_classes(models["student"]),
        teacher_features=_features,
        student_features=_features,
        journal=journal,
        seed=seed,
        progress=progress,
    )
    report = {"teacher": str(teacher), "student": str(student), "data": str(data), **options, **facts}
    save_hf_directory(
        stored_state(trained, trained.state_dict()),
        out,
        like=checkpoints["student"],
        extra_files={"distillation_report.json": json.dumps(report, indent=2) + "\n"},
        overwrite=overwrite,
        progress=progress,
    )
    journal.remove()
    return report


def _classes(model: nn.Module) -> list[str] | None:
    """The class names of a classifier of transformers, in the order of its logits."""
    labels = getattr(model.config, "id2label", None)
    return [labels[place] for place in sorted(labels)] if labels else None


def _features(model: nn.Module, batch: Batch) -> Tensor:
    """A transformers model's last hidden states, averaged over tokens (without padding) or positions, [N, d]."""
    inputs = batch if isinstance(batch, Mapping) else {model.main_input_name: batch}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    if hidden.dim() == 4:  # of a convolutional network, [N, d, height, width]
        return hidden.mean((2, 3))
    mask = inputs.get("attention_mask", hidden.new_ones(hidden.shape[:2])).unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)
