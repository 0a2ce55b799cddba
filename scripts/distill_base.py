"""Rebuild the base of suite vit8: distil EfficientNet-Lite0's features into the small vision transformer.

    python scripts/distill_base.py [--threads 2]

All training images of the suite's data sets are used, without labels, many more than the suite's own splits hold; the
validation and test images are those of the splits and are never seen. One hour on one core. An interrupted run goes on
where it was: until it is done, the teacher's features (0.5 GB) and a journal are kept in the package's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from statsmerge_ext.calibration import as_named
from statsmerge_ext.checkpoints.fingerprint import fingerprint
from statsmerge_ext.checkpoints.writing import atomic_output
from statsmerge_ext.distillation.student import StudentTraining, distill
from statsmerge_ext.engine.journal import Journal
from statsmerge_ext.evaluation.datasets import PackageStore, cache_directory, load_or_build
from statsmerge_ext.evaluation.suites.suite import DATA_SEED
from statsmerge_ext.evaluation.suites.vision8 import vision8
from statsmerge_ext.evaluation.suites.vit8 import BASE, FEATURES, untrained, vit8
from statsmerge_ext.memory import keep_freed_memory

SEED = 0
# Images of each data set in a batch. The two large ones are gone through once, the others several times.
SHARES = {"mnist": 16, "fashion": 16}
OTHER_SHARE = 6
TRAINING = StudentTraining(feature_weight=1.0, epochs=1, lr=7e-4, weight_decay=0.05, autocast=True)


def unlabelled_images() -> dict[str, np.ndarray]:
    """All training images of every data set: uint8 [N, h, w] or [N, h, w, 3]."""
    sizes = dataclasses.replace(vit8.sizes, train=10**9)
    with tempfile.TemporaryDirectory(prefix="statsmerge-") as scratch:
        store = PackageStore(Path(scratch))
        return {dataset.name: load_or_build(dataset, sizes, DATA_SEED, store).train.inputs for dataset in vit8.datasets}


def make_batches(images: dict[str, np.ndarray]) -> list[dict[str, Tensor]]:
    """Mixed batches: raw images of every data set, how far they are to be moved, and the batch's place."""
    generator = np.random.default_rng(SEED)
    count = min(len(images[name]) // share for name, share in SHARES.items())
    drawn = {}
    for name, of_name in images.items():
        share = SHARES.get(name, OTHER_SHARE)
        rounds = -(-count * share // len(of_name))
        rows = np.concatenate([generator.permutation(len(of_name)) for _ in range(rounds)])
        drawn[name] = torch.from_numpy(of_name[rows[: count * share]]).split(share)
    offsets = torch.from_numpy(generator.integers(-4, 5, (count, 2)))
    return [
        {name: parts[place] for name, parts in drawn.items()}
        | {"offset": offsets[place], "place": torch.tensor([place])}
        for place in range(count)
    ]


def encode(batch: dict[str, Tensor]) -> Tensor:
    """A mixed batch as both models take it, float32 [N, 3, 64, 64]."""
    encoded = [vision8.encode(raw.numpy()) for name, raw in batch.items() if name not in ("offset", "place")]
    return torch.roll(torch.cat(encoded), batch["offset"].tolist(), (2, 3))


def teacher_features(batches: list[dict[str, Tensor]], path: Path) -> np.ndarray:
    """EfficientNet-Lite0's features of every batch, float16 [batches, N, 1280], kept in the file ``path``."""
    teacher = vision8.load_base()
    shape = (len(batches), len(encode(batches[0])), FEATURES)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = np.lib.format.open_memmap(path, "r+" if path.exists() else "w+", np.float16, shape)
    done = int((known[:, -1].max(1) > 0).sum())  # batches that are not there yet are all zero
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for place in trange(done, len(batches), initial=done, total=len(batches), desc="Teacher", unit="batch"):
            known[place] = vision8.forward(teacher, encode(batches[place])).half().numpy()
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    keep_freed_memory()
    images = unlabelled_images()
    batches = make_batches(images)
    data = fingerprint(as_named(batches[:: len(batches) // 16]))
    work = cache_directory() / "vit8"
    known = work / f"features-{data[:12]}.npy"
    features = teacher_features(batches, known)
    torch.manual_seed(SEED)
    student = untrained()
    journal = Journal(work / "base.journal", {"data": data, "training": repr(TRAINING), "seed": SEED})
    with sdpa_kernel(SDPBackend.MATH):  # for 64 tokens its backward pass takes half the fused one's time
        trained, facts = distill(
            student,  # never called: its teacher's features are known
            student,
            batches,
            training=TRAINING,
            teacher_forward=None,
            teacher_features=lambda _, batch: torch.from_numpy(features[int(batch["place"])]),
            student_features=lambda model, batch: model(encode(batch)),
            journal=journal,
            seed=SEED,
            progress=True,
        )
    BASE.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"seed": SEED, "images": {name: len(of_name) for name, of_name in images.items()}}
    with atomic_output(BASE, overwrite=True) as temporary:
        halves = {key: value.half().contiguous() for key, value in trained.state_dict().items()}
        temporary.write_bytes(safetensors.torch.save(halves, metadata={"distillation": json.dumps(facts)}))
    journal.remove()
    known.unlink()
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
