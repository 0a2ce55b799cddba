"""A merge of a transformers model block by block, from disk to disk: evidence, solution and output of one at a time."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.calibration import Batch
from statsmerge_ext.checkpoints import Checkpoint, check_compatible, open_checkpoint
from statsmerge_ext.checkpoints.compatibility import Renamed, dtype_of, floating_names, shape_of
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.skeleton import FileNames, build_skeleton
from statsmerge_ext.engine import processes
from statsmerge_ext.engine.block_evidence import GramSweep
from statsmerge_ext.engine.block_order import OrderedSweep, rehearse_flows
from statsmerge_ext.engine.block_sweep import BlockSweep, InMemory
from statsmerge_ext.engine.blocks import Block, BlockModel
from statsmerge_ext.engine.buffers import merge_buffers
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.engine.problem import MergedLayers, MergeProblem
from statsmerge_ext.engine.report import facts_for_report, layer_report
from statsmerge_ext.engine.shared_evidence import shared_batches
from statsmerge_ext.engine.streaming import DEFAULT_BUDGET
from statsmerge_ext.engine.together import samples
from statsmerge_ext.memory import give_back_freed_memory
from statsmerge_ext.methods import Method
from statsmerge_ext.output import ResumableOutput, resumable_output


class BlockMerge:
    """A merge of checkpoints that transformers can load, by a method that goes by layers or in execution order.

    Args:
        method: one that is ``by_layer`` and needs Gram matrices, or ``in_order``.
        base, experts: checkpoints.
        batches: expert -> unlabelled batches.
        device: where the model runs.
        hyperparameters: the method's.
        seed: of all that is random.
        memory_budget: bytes of hidden states that stay in memory between two blocks; None: a default.

    Attributes:
        facts: for the report.
        coefficients, learner: None; such methods have neither.
        left_over: floating-point tensors of the files that the model does not use, and that are not written.

    Raises:
        CheckpointError: as :func:`check_compatible`, :func:`build_skeleton` and :class:`FileNames`.
        MethodError: a hyperparameter that the method does not take.
        Exception: whatever the model raises when it is run; it may be one that cannot be taken block by block.
    """

    coefficients = learner = None

    def __init__(
        self,
        method: Method,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        batches: Mapping[str, list[Batch]],
        device: str | torch.device,
        *,
        hyperparameters: Mapping[str, object],
        seed: int,
        memory_budget: int | None,
    ) -> None:
        method.check(hyperparameters)
        self._method, self._hyperparameters, self._seed = method, hyperparameters, seed
        self._batches, self._budget = batches, memory_budget or DEFAULT_BUDGET
        fitting = check_compatible(base, experts)
        skeleton = build_skeleton(base)
        self._files = FileNames(skeleton, base)
        self._stored = {"": base, **fitting}
        self._base = self._files.state(base)
        self._experts = {name: self._files.state(state) for name, state in fitting.items()}
        self._sources = {name: f"expert {name!r} ({expert.path})" for name, expert in experts.items()}
        self._base_source = f"base ({base.path})"
        self._model = BlockModel(skeleton, device, default_forward)
        first = next(iter(batches.values()))[0]
        if method.in_order:
            self._calls, self._flows = rehearse_flows(self._model, first, method.ordered(self._model.layers))
        else:
            self._calls = self._model.rehearse(first)
        self._seen: set[str] = set()
        self._notes: dict[str, dict] = {}
        self._seconds = {"evidence": 0.0, "merge": 0.0}
        self.left_over = self._files.left_over
        method.check_layers(self._model.layers)
        self._watched = method.watched(self._model.layers)
        self.facts = facts_for_report(method, hyperparameters, self._model.layers, list(experts), "average", seed)

    @property
    def report(self) -> dict:
        """As in :class:`~statsmerge_ext.engine.merging.MergeResult`."""
        notes = self._notes
        if self._method.in_order:
            never = [x.name for x in self._model.layers if x.source and x.name not in self._seen]
            notes = {**notes, "never_called": never}
        layers = layer_report(self._model.layers, self._watched, None if self._method.in_order else self._seen)
        return {**self.facts, "layers": layers, "seconds": dict(self._seconds), **notes}

    def write(self, output: ResumableOutput, *, progress: bool) -> None:
        """Write all tensors of the output; blocks that an earlier run has written are only gone through.

        Every process of a group calls this alike and runs its share of the samples. Those that merge in execution order
        all need the solution; otherwise the first one alone solves, and always it writes.

        Raises as :meth:`BlockSweep.problems`, and what the method raises.
        """
        done: list[str] = []
        changed = False
        for saved in output.saved:
            done, changed = saved["done"], saved["changed"]
            self._seen, self._notes = set(saved["seen"]), saved["notes"]
        leader = processes.rank() == 0
        for name, tensor in self._beside_parameters().items() if leader else ():
            output.write(name, output.converted(name, tensor))
        processes.wait_for_all()
        scratch = output.scratch / f"states.{processes.rank()}"
        sweep = self._sweep(self._experts, shared_batches(self._batches), scratch, output)
        sweep.changed = changed
        total = len(self._model.blocks) + 1
        clock = time.perf_counter()
        with (
            closing(sweep.problems(without=done)) as problems,
            tqdm(desc="Merging", unit="block", total=total, disable=not (progress and leader)) as bar,
        ):
            for block, problem in problems:
                collected = time.perf_counter()
                if problem is not None and (leader or self._method.in_order):
                    self._merge_block(block, problem, output if leader else None)
                    done = [*done, block.path]
                    if leader:
                        saved = {"seen": sorted(self._seen), "notes": self._notes, "changed": sweep.changed}
                        output.save_if_due({"done": done, **saved})
                del problem
                if self._method.in_order:
                    give_back_freed_memory()  # which lies between what many passes hold
                    processes.wait_for_all()  # for what is written, which others may read
                self._seconds["evidence"] += collected - clock
                clock = time.perf_counter()
                self._seconds["merge"] += clock - collected
                bar.update()

    def estimate(self, infos: Mapping[str, TensorInfo], out: Path) -> dict[str, float]:
        """What the merge will need, from merging one block of each kind for two experts beside ``out``; for all of
        them in execution order, where the weights of all are in memory at once, or if there are rules, whose methods
        may have a weight for each.

        The other blocks are not computed.

        Args:
            infos: name → shape and dtype of every tensor of the output.
            out: where the output shall be.

        Returns: "bytes_read" (of base and experts), "seconds", and "memory": the largest resident size, in bytes.

        Raises as :meth:`write`.
        """
        blocks = (*self._model.blocks, self._model.resident)
        first: dict[tuple, str] = {}
        like = {block.path: first.setdefault(self._kind(block), block.path) for block in blocks}
        need_all = self._method.in_order or "rules" in self.facts
        experts = dict(list(self._experts.items())[: None if need_all else 2])
        sample = {name: self._batches[name][:1] for name in experts}
        measured = [block for block in blocks if like[block.path] == block.path]
        names = {name for block in measured for layer in block.layers for name in self._files.sources(layer.parameter)}
        solving: dict[str, float] = {}
        parent = next(parent for parent in out.absolute().parents if parent.exists())
        with TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as directory:
            beside = self._beside_parameters()
            file = resumable_output(
                Path(directory) / "sample.safetensors",
                {name: infos[name] for name in (*names, *beside)},
                {},
                resume=False,
                shard_bytes=None,
            )
            others = {path: first for path, first in like.items() if path != first}
            with file as output:
                for name, tensor in beside.items():
                    output.write(name, output.converted(name, tensor))
                sweep = self._sweep(experts, sample, Path(directory), output)
                with closing(sweep.problems(instead=others)) as problems:
                    for block, problem in problems:
                        began, before = time.perf_counter(), _seconds(sweep, block.path)
                        if problem is not None:
                            self._merge_block(block, problem, output)
                        del problem
                        solving[block.path] = time.perf_counter() - began
                        solving[block.path] -= _seconds(sweep, block.path)["samples"] - before["samples"]
        per_sample = _samples(self._batches) / _samples(sample)
        per_expert = len(self._experts) / len(experts)

        def seconds(path: str) -> float:
            spent = _seconds(sweep, path)
            return per_expert * spent["experts"] + per_sample * spent["samples"] + solving[path]

        most = sweep.carried.most
        states = self._stored.values()
        return {
            "bytes_read": sum(
                shape_of(state, name).numel() * dtype_of(state, name).itemsize
                for state in states
                for name in floating_names(state)
            ),
            "seconds": sum(seconds(like[block.path]) for block in blocks),
            "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            + int(min(self._budget, per_sample * most) - min(self._budget, most)),
        }

    def _kind(self, block: Block) -> tuple:
        """What blocks that take the same time have in common."""
        shapes = [(key.removeprefix(block.path), self._model.shapes[key]) for key in block.keys]
        watched = self._method.watched(block.layers)
        rules = {name: rule["filter"] for rule in self.facts.get("rules", ()) for name in rule["layers"]}
        kinds = [(layer.kind, layer.source, layer in watched, rules.get(layer.name)) for layer in block.layers]
        return tuple(shapes), tuple(kinds), block in self._calls

    def _sweep(
        self,
        experts: Mapping[str, Mapping[str, Tensor]],
        batches: Mapping[str, list[Batch]],
        scratch: Path,
        output: ResumableOutput,
    ) -> BlockSweep:
        problem = MergeProblem(
            layers=self._model.layers,
            base=self._base,
            experts=experts,
            batches=batches,
            base_source=self._base_source,
            sources=self._sources,
            seed=self._seed,
        )
        if not self._method.in_order:
            return GramSweep(self._model, self._calls, problem, scratch, self._budget, watched=self._watched)

        def rounded(key: str, merged: Tensor) -> Tensor:
            return output.converted(self._files.sources(key)[0], merged).to(merged.dtype)

        written = InMemory(self._files.state(open_checkpoint(output.path)))
        options = {"flows": self._flows, "written": written, "rounded": rounded}
        return OrderedSweep(self._model, self._calls, problem, scratch, self._budget, **options)

    def _merge_block(self, block: Block, problem: MergeProblem, output: ResumableOutput | None) -> None:
        """Solve a block, and write it to ``output``, if any."""
        names = {layer.name for layer in block.layers if layer.source}
        if problem.evidence is not None:  # which the method takes apart
            self._seen |= names & problem.evidence.seen
        solution = self._method(problem, **self._hyperparameters)
        if self._method.in_order:
            self._seen |= names.difference(solution.notes["never_called"])
        if output is None:
            return
        put_together: dict[str, Tensor] = {}
        for key, first, merged in _merged(solution.parameters, problem):
            if self._files.is_direct(key):
                for name in self._files.direct[key]:
                    output.write(name, output.converted(name, merged), first)
            else:
                whole = put_together.setdefault(key, merged.new_empty(self._model.shapes[key]))
                whole.view(-1)[first : first + merged.numel()] = merged.reshape(-1)
        for name, merged in self._files.stored(put_together).items():
            output.write(name, output.converted(name, merged))
        self._files.forget()
        for name, note in solution.notes.items():
            if name != "never_called":
                self._notes.setdefault(name, {}).update(note)

    def _beside_parameters(self) -> dict[str, Tensor]:
        """The tensors of the output that are no parameters, by their names in the files."""
        parameters = {layer.parameter for layer in self._model.layers}
        merged = {name for key in parameters for name in self._files.sources(key)}
        base, *experts = self._stored.values()
        names = [name for name in base if name not in merged and name not in self.left_over]

        def beside(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return Renamed(state, {name: name for name in names})

        states = dict(zip(self._experts, map(beside, experts), strict=True))
        return merge_buffers(MergeProblem([], beside(base), states), {}, reestimate=False)


def write_blockwise(
    merge: BlockMerge,
    out: Path,
    infos: Mapping[str, TensorInfo],
    identity: Mapping[str, object],
    *,
    progress: bool = False,
    **writing: object,
) -> None:
    """Merge block by block and write the result, with all that belongs to it, whole or not at all.

    Every process of a group calls this alike.

    Args:
        merge: what is to be merged.
        out, infos, identity, writing: of :func:`resumable_output`.
        progress: show a progress bar.

    Raises as :meth:`BlockMerge.write` and :func:`resumable_output`.
    """
    with resumable_output(out, infos, identity, **writing) as output:
        merge.write(output, progress=progress)


def _merged(parameters: Mapping[str, Tensor], problem: MergeProblem) -> Iterator[tuple[str, int, Tensor]]:
    """(key, first element, merged elements) of all parameters."""
    if not isinstance(parameters, MergedLayers):
        yield from ((key, 0, merged) for key, merged in parameters.items())
        return
    with closing(parameters.stream(parameters).results(parameters.merged)) as results:
        for piece, merged in results:
            yield piece.layer.parameter, piece.start(problem.base), merged


def _seconds(sweep: BlockSweep, path: str) -> dict[str, float]:
    return dict(sweep.seconds.get(path, {"experts": 0.0, "samples": 0.0}))


def _samples(batches: Mapping[str, list[Batch]]) -> int:
    return sum(samples(batch) for of_expert in batches.values() for batch in of_expert)
