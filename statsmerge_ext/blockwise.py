"""A merge of a transformers model block by block, from disk to disk: evidence, solution and output of one at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from statsmerge_ext.calibration import Batch
from statsmerge_ext.checkpoints import Checkpoint, check_compatible, open_checkpoint
from statsmerge_ext.checkpoints.compatibility import Renamed
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
from statsmerge_ext.layers import Layer
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
        states: name of an expert, or "" for the base -> its tensors, under the base's names.
        batches: of all experts.
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
        self.batches, self._budget = batches, memory_budget or DEFAULT_BUDGET
        fitting = check_compatible(base, experts)
        skeleton = build_skeleton(base)
        self._files = FileNames(skeleton, base)
        self.states = {"": base, **fitting}
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

    def write(
        self, output: ResumableOutput, *, progress: bool = False, instead: Mapping[str, str] | None = None
    ) -> BlockSweep:
        """Write all tensors of the output; blocks that an earlier run has written are only gone through, and those that
        others stand for (``instead``, of :meth:`BlockSweep.problems`) are not computed.

        Every process of a group calls this alike and runs its share of the samples. Those that merge in execution order
        all need the solution; otherwise the first one alone solves, and always it writes.

        Returns: what all blocks were taken through; it says what that took.

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
        sweep = self._sweep(output)
        sweep.changed = changed
        clock = time.perf_counter()
        with (
            closing(sweep.problems(without=done, instead=instead)) as problems,
            tqdm(desc="Merging", unit="block", total=len(self._blocks), disable=not (progress and leader)) as bar,
        ):
            for block, problem in problems:
                collected = time.perf_counter()
                if problem is not None and (leader or self._method.in_order):
                    with sweep.solving(block):
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
        return sweep

    def sample(self) -> BlockMerge:
        """The same merge with one batch for each of two experts, which tell what all of them will take.

        It has all experts in execution order, where the weights of all are in memory at once, and if there are rules,
        whose methods may have a weight for each.
        """
        sample = copy.copy(self)
        need_all = self._method.in_order or "rules" in self.facts
        sample._experts = dict(list(self._experts.items())[: None if need_all else 2])
        sample.batches = {name: self.batches[name][:1] for name in sample._experts}
        sample._seen, sample._notes, sample._seconds = set(), {}, dict.fromkeys(self._seconds, 0.0)
        return sample

    def alike(self) -> dict[str, str]:
        """The path of every block -> that of the first one which takes the same time and memory."""
        first: dict[tuple, str] = {}
        return {block.path: first.setdefault(self._kind(block), block.path) for block in self._blocks}

    def names(self, paths: Container[str]) -> set[str]:
        """The tensors of the output that :meth:`write` writes if it merges the blocks at ``paths`` alone."""
        layers = (layer for block in self._blocks if block.path in paths for layer in block.layers)
        return self._names_of(layers) | self._names_beside_parameters()

    @property
    def _blocks(self) -> tuple[Block, ...]:
        return (*self._model.blocks, self._model.resident)

    def _kind(self, block: Block) -> tuple:
        shapes = [(key.removeprefix(block.path), self._model.shapes[key]) for key in block.keys]
        watched = self._method.watched(block.layers)
        rules = {name: rule["filter"] for rule in self.facts.get("rules", ()) for name in rule["layers"]}
        kinds = [(layer.kind, layer.source, layer in watched, rules.get(layer.name)) for layer in block.layers]
        return tuple(shapes), tuple(kinds), block in self._calls

    def _sweep(self, output: ResumableOutput) -> BlockSweep:
        problem = MergeProblem(
            layers=self._model.layers,
            base=self._base,
            experts=self._experts,
            batches=shared_batches(self.batches),
            base_source=self._base_source,
            sources=self._sources,
            seed=self._seed,
        )
        scratch = output.scratch / f"states.{processes.rank()}"
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
        names = {name: name for name in self._names_beside_parameters()}
        base, experts = self.states[""], {name: self.states[name] for name in self._experts}
        beside = {name: Renamed(state, names) for name, state in experts.items()}
        return merge_buffers(MergeProblem([], Renamed(base, names), beside), {}, reestimate=False)

    def _names_beside_parameters(self) -> set[str]:
        return set(self.states[""]) - self._names_of(self._model.layers) - set(self.left_over)

    def _names_of(self, layers: Iterable[Layer]) -> set[str]:
        """The names in the files of the layers' parameters."""
        return {name for layer in layers for name in self._files.sources(layer.parameter)}


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
