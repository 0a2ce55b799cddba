"""Distilling a teacher into a student of another architecture, so that it can be merged (StatsMerging, 2506.04567)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from statsmerge_ext.calibration import Batch, as_unlabelled_batches
from statsmerge_ext.distillation.losses import feature_loss, pseudo_label_loss, soft_target_loss
from statsmerge_ext.distillation.teachers import logits_of, token_mask
from statsmerge_ext.engine.journal import Journal
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.errors import CalibrationError, MethodError


@dataclass(frozen=True)
class StudentTraining:
    """How a student is trained: AdamW with a learning rate that falls to zero along a cosine.

    The loss is α CE(pseudo-labels) + (1 − α) T² KL(teacher ‖ student) + β · feature distance; for a teacher without
    logits it is the last term alone.

    Attributes:
        alpha: α, the share of the teacher's most likely class.
        temperature: T, of both distributions.
        feature_weight: β; above 0 the student's features are drawn to the teacher's, through a linear map that is
            learned and thrown away. Features of a teacher without logits are matched as they are.
        epochs, lr, weight_decay: of the optimiser.
        autocast: run the student in bfloat16 where torch.autocast does.
    """

    alpha: float = 0.7
    temperature: float = 4.0
    feature_weight: float = 0.0
    epochs: int = 30
    lr: float = 1e-4
    weight_decay: float = 0.01
    autocast: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise MethodError(f"alpha: expected a number in [0, 1], got {self.alpha}")
        for name in ("temperature", "epochs", "lr"):
            if not getattr(self, name) > 0:
                raise MethodError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("feature_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise MethodError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    *,
    student_batches: Sequence[Batch] | None = None,
    training: StudentTraining = StudentTraining(),
    teacher_classes: Sequence[str] | None = None,
    student_classes: Sequence[str] | None = None,
    teacher_forward: Callable[[nn.Module, object], object] | None = default_forward,
    student_forward: Callable[[nn.Module, object], object] = default_forward,
    teacher_features: Callable[[nn.Module, object], Tensor] | None = None,
    student_features: Callable[[nn.Module, object], Tensor] | None = None,
    journal: Journal | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[nn.Module, dict]:
    """Train a copy of ``student`` on what ``teacher`` says of unlabelled batches.

    Args:
        teacher, student: any architectures; both give logits [N, C] or [N, T, C], or outputs that have them.
        batches: of inputs, without labels.
        student_batches: the same samples as the student takes them (another tokenizer, another image size); None: as
            the teacher does.
        training: loss and optimiser.
        teacher_classes, student_classes: names of the classes in the order of the logits; the teacher's are put in the
            student's order. None for both: the classes are the same, in the same order.
        teacher_forward, student_forward: run a model on a batch. ``teacher_forward`` None: the teacher has no logits,
            as an embedding model; the student is to give its features, and ``student_forward`` is not called.
        teacher_features, student_features: (model, batch) -> features [N, d], for ``feature_weight`` above 0.
        journal: where progress is kept; the same call takes it up there and gives the same student.
        seed: of the order of the batches and of dropout.
        progress: show a progress bar.

    Returns:
        the trained student in eval mode, and JSON-able facts: settings, loss and agreement with the teacher's most
        likely class (without logits: the mean cosine of the features) on the training samples, first and last epoch.

    Raises:
        MethodError: classes or features that do not match, features that are missing, or a loss that is not finite.
        CalibrationError: no batches, labels among them, or outputs that are no logits.
    """
    batches = as_unlabelled_batches("distillation", batches)
    inputs = batches if student_batches is None else as_unlabelled_batches("the student", student_batches)
    if len(inputs) != len(batches):
        raise CalibrationError(f"student_batches: expected {len(batches)} as for the teacher, got {len(inputs)}")
    order = _class_order(teacher_classes, student_classes)
    embedding, matching = teacher_forward is None, training.feature_weight > 0
    if embedding and (order is not None or not matching):
        raise MethodError("teacher_forward: without logits there are no classes, and feature_weight must be above 0")
    if matching and (teacher_features is None or student_features is None):
        raise MethodError("feature_weight: above 0 it needs teacher_features and student_features")

    teacher = teacher.eval()
    with torch.no_grad():
        targets = [] if embedding else [logits_of(None, teacher_forward(teacher, batch)) for batch in batches]
        features = [teacher_features(teacher, batch) for batch in batches] if matching else None
    if order is not None:
        if targets[0].shape[-1] != len(order):
            raise MethodError(f"teacher_classes: {len(order)} names for {targets[0].shape[-1]} logits")
        targets = [target[..., order] for target in targets]

    student = copy.deepcopy(student)
    bridge = None
    if matching and not embedding:
        with torch.no_grad():
            width = student_features(student.eval(), inputs[0]).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            bridge = nn.Linear(width, features[0].shape[-1]).to(features[0])

    def features_loss(place: int) -> tuple[Tensor, float]:
        with torch.autocast(features[place].device.type, torch.bfloat16, enabled=training.autocast):
            mine = student_features(student, inputs[place])
        mine, theirs = mine.float(), features[place].float()
        if mine.shape != theirs.shape:
            shapes = f"{list(mine.shape)}, the teacher's have {list(theirs.shape)}"
            raise MethodError(f"student: its features have shape {shapes}; without logits they must be alike")
        cosine = F.cosine_similarity(mine.detach(), theirs, dim=-1)
        return training.feature_weight * feature_loss(mine, theirs), float(cosine.mean())

    def logits_loss(place: int) -> tuple[Tensor, float]:
        with torch.autocast(targets[place].device.type, torch.bfloat16, enabled=training.autocast):
            logits = logits_of(None, student_forward(student, inputs[place]))
            mine = bridge(student_features(student, inputs[place])) if matching else None
        logits, target = logits.float(), targets[place].float()
        if logits.shape != target.shape:
            shapes = f"{list(logits.shape)}, the teacher's have {list(target.shape)}"
            raise MethodError(f"student: its logits have shape {shapes}; match the classes by their names")
        mask = token_mask(inputs[place], logits)
        labels = target.argmax(-1)
        hard = pseudo_label_loss(logits, labels, mask)
        soft = soft_target_loss(logits, target, training.temperature, mask)
        loss = training.alpha * hard + (1 - training.alpha) * soft
        if matching:
            loss = loss + training.feature_weight * feature_loss(mine.float(), features[place].float())
        return loss, float((logits.detach().argmax(-1) == labels).float().mean())

    loss_of = features_loss if embedding else logits_loss
    history = _train(student, bridge, loss_of, len(batches), training, journal, seed, progress)
    facts = {"settings": asdict(training), "first": history[0], "last": history[-1], "batches": len(batches)}
    return student.eval(), facts


def _train(
    student: nn.Module,
    bridge: nn.Module | None,
    loss_of: Callable[[int], tuple[Tensor, float]],
    count: int,
    training: StudentTraining,
    journal: Journal | None,
    seed: int,
    progress: bool,
) -> list[dict]:
    """Run all steps, from the journal's on; returns each epoch's mean loss and agreement."""
    modules = nn.ModuleList([student] if bridge is None else [student, bridge])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    steps = training.epochs * count
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    history: list[dict] = []
    done, sums = 0, [0.0, 0.0]  # of the present epoch: losses, agreements
    state = journal.load() if journal else None
    if state:
        history, done, sums = state["history"], state["done"], state["sums"]
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    modules.train()
    bar = tqdm(range(done, steps), initial=done, total=steps, desc="Distilling", unit="step", disable=not progress)
    with torch.random.fork_rng(devices=[]):
        for step in bar:
            epoch, turn = divmod(step, count)
            if turn == 0 or step == done:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order = torch.randperm(count, generator=generator).tolist()
            torch.manual_seed(seed * 1_000_003 + step)  # a step's randomness is its own, so that it can be resumed
            loss, agreement = loss_of(order[turn])
            if not math.isfinite(loss.item()):
                raise MethodError(f"distillation: the loss is {loss.item()}; try a smaller lr than {training.lr}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            sums = [sums[0] + loss.item(), sums[1] + agreement]
            means = {"loss": sums[0] / (turn + 1), "agreement": sums[1] / (turn + 1)}
            bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
            if turn == count - 1:
                history, sums = [*history, means], [0.0, 0.0]
            if journal:
                journal.save(
                    {
                        "history": history,
                        "done": step + 1,
                        "sums": sums,
                        "modules": modules.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                    }
                )
    return history


def _class_order(teacher: Sequence[str] | None, student: Sequence[str] | None) -> list[int] | None:
    """Where each of the student's classes is among the teacher's."""
    if teacher is None and student is None:
        return None
    if teacher is None or student is None:
        raise MethodError("teacher_classes, student_classes: give both, or neither where the classes are the same")
    for label, names in (("teacher_classes", teacher), ("student_classes", student)):
        if len(set(names)) != len(names):
            raise MethodError(
                f"{label}: a name is given twice: {sorted(n for n in names if list(names).count(n) > 1)[0]!r}"
            )
    missing, extra = sorted(set(teacher) - set(student)), sorted(set(student) - set(teacher))
    if missing or extra:
        raise MethodError(
            f"student_classes: expected the teacher's {len(teacher)} classes; "
            f"the student lacks {missing[:4]}, and has {extra[:4]} besides"
        )
    return [list(teacher).index(name) for name in student]
