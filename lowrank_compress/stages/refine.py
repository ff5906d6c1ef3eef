"""Fit the matrices of a compressed checkpoint anew to what the dense model does, in closed form, block by block.

A gradient pass over the dense model says what errors cost; then both models are walked through side by side, and each
map is fitted to inputs that those before it have already changed. On text that was kept out of all fits the result must
be nearer to the dense model than what it was made from; else that is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_compress.artifacts.directories import files_in, replacing
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, listed
from lowrank_compress.artifacts.stream import Lazy
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.capture import capture, numbered
from lowrank_compress.config import RefineConfig
from lowrank_compress.errors import CheckpointError, InputError
from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.tasks import unit_of_loss
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.segments import boundary_bytes
from lowrank_compress.model.walk.states import StateStore
from lowrank_compress.model.walk.walk import Walk
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.reading import require_labels
from lowrank_compress.stages.refining import BlockRefiner, computing_dtype, kept_bytes
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.rewrite import contents_of, refuse_packed, rewrite
from lowrank_compress.stages.run import made_once, work_of
from lowrank_compress.stages.samples import calibration_batches, held_out_batches, settings_of, text_id, with_drawn
from lowrank_compress.stages.stage import Given

VERSION = 4
KEEP = "keep"


def key(config: RefineConfig, inputs: Given) -> Key:
    """Everything that the refined checkpoint and its report depend on; a text counts by its content."""
    assert inputs.dense is not None
    found = contents_of(inputs.checkpoint)
    found |= {"dense": checkpoint_id(inputs.dense), "text": text_id(config)}
    return Key("refine", VERSION, settings_of(config), found)


def run(
    config: RefineConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    gradients: Sequence[BlockFiles] = (),
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Refine.

    Parameters
    ----------
    config, inputs
        What to do on what; the dense original is one of the inputs.
    out_dir
        The directory of the new checkpoint, which appears whole or not at all.
    reporter
        Told about progress and warnings.
    gradients
        Where statistics of the dense model's gradients may be that were taken of this very text, by halves; what is
        missing is taken anew, to the same bytes.
    resources
        What the first process may use; all are called with the same.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        The checkpoint is not compressed by this package, its original or the data are missing, or another result is in
        `out_dir`.
    """
    if inputs.checkpoint.quantization is None:
        raise CheckpointError(
            f"{inputs.checkpoint.path} is not compressed by this program: there is nothing to refine. Compress it "
            "first, with `lrc compress`."
        )
    if inputs.dense is None:
        raise InputError("Refining needs the dense original beside the compressed checkpoint; name it with --dense.")
    refuse_packed(inputs.checkpoint, "refine")
    identity = key(config, inputs)

    def make() -> Manifest:
        alone = resources.alone(config.device)
        return _Refinement(config, inputs, out_dir, identity, reporter or Silent(), alone, gradients).make()

    return made_once(out_dir, identity, make, resources.workers, overwrite=overwrite)


class _Refinement:
    """One run of the stage."""

    def __init__(
        self,
        config: RefineConfig,
        inputs: Given,
        out_dir: Path,
        identity: Key,
        reporter: Reporter,
        resources: Resources,
        gradients: Sequence[BlockFiles],
    ) -> None:
        assert inputs.dense is not None
        self.config, self.checkpoint, self.out_dir = config, inputs.checkpoint, out_dir
        self.identity, self.reporter, self.resources = identity, reporter, resources
        device, dtype = torch.device(config.device), computing_dtype(inputs.checkpoint.dtype)
        room = resources.for_experts
        self.dense = Skeleton(inputs.dense, device, dtype, for_experts=room)
        self.compressed = Skeleton(inputs.checkpoint, device, dtype, beside=self.dense, for_experts=room)
        if _shape(self.dense) != _shape(self.compressed):
            raise CheckpointError(
                f"{inputs.checkpoint.path} was not made from {inputs.dense.path}: they have other blocks. Name its "
                "original with --dense."
            )
        self.batches = numbered(self._batches(inputs.dense))
        self.held_out = held_out_batches(config, inputs.dense, self.dense.blueprint.task)
        self.work = work_of(out_dir)
        self.fisher = BlockFiles(self.work, identity.id, "fisher")
        self.known = gradients if dtype == torch.float32 else ()
        self.refined = BlockFiles(self.work, identity.id, "refined")
        self.blocks = range(len(self.dense.resolved.blocks))

    def _batches(self, dense: Checkpoint) -> list[Batch]:
        batches = calibration_batches(self.config, dense, self.dense.blueprint.task)
        require_labels(batches, self.dense.blueprint.task)
        return with_drawn(batches, self.config.drawn, dense, self.dense.blueprint.task)

    def make(self) -> Manifest:
        """Refine all blocks that are not yet, and write the better checkpoint."""
        # Of both models what enters blocks, and what attention and MLP come to.
        beside = 2 * (boundary_bytes(self.dense, self.batches) + kept_bytes(self.dense, self.batches))
        refiner = BlockRefiner(
            self.dense,
            self.compressed,
            self.batches,
            self.config.lambdas,
            self.config.damping_fisher,
            keeps=beside <= self.resources.for_states,
            room=self.resources.for_sums,
            directory=self.work,
        )
        self._take_gradients(refiner)
        self._refine(refiner)
        before, after = self._divergences()
        taken = after < before
        if not taken:
            unit = unit_of_loss(self.dense.task, any(batch.paired for batch in self.held_out))
            self.reporter.warn(
                f"Refined weights were no nearer to the dense model on other text ({after:.4g} {unit}, before "
                f"{before:.4g}): the checkpoint keeps its weights."
            )
        chosen = {name: value for block in self.blocks for name, value in self.refined.notes(block)["lambdas"].items()}
        said = {"taken": taken, "divergence_before": before, "divergence_after": after, "lambdas": chosen}
        with replacing(self.out_dir, listed) as draft:
            manifest = self._write(draft, taken, said)
        self.refined.remove(self.blocks)
        self.fisher.remove(self.blocks)
        return manifest

    def _take_gradients(self, refiner: BlockRefiner) -> None:
        """Keep what errors of each block cost, where it is not known yet."""
        missing = [b for b in self.blocks if not self.refined.finished(b) and self._costs(b, refiner) is None]
        if not missing:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        captured = capture(
            self.dense,
            self.batches,
            refiner.wanted(),
            skip=lambda block: block not in missing,
            clip=self.config.clip,
            advance=self.reporter.advance,
            spill_to=self.work,
            resources=self.resources,
            halves=True,
        )
        for block in captured:
            keys = refiner.keys(block.block)
            self.fisher.write(block.block, {key: mean.float() for key, mean in block.means.items() if key in keys})

    def _costs(self, block: int, refiner: BlockRefiner) -> BlockFiles | None:
        """Where all is that is asked of a block's gradients; None if it is nowhere."""
        keys = refiner.keys(block)
        return next((f for f in (self.fisher, *self.known) if f.finished(block) and keys <= {*f.shapes(block)}), None)

    def _refine(self, refiner: BlockRefiner) -> None:
        """Fit block after block, each to what those before it have become."""
        if all(self.refined.finished(block) for block in self.blocks):
            return
        size = 2 * boundary_bytes(self.dense, self.batches)
        store = StateStore(size > self.resources.for_states, self.work)
        for step in Walk([self.dense, self.compressed], self.batches, store=store).forwards():
            if self.refined.finished(step.index):
                self._load(self.compressed, step.index)
            else:
                costs = self._costs(step.index, refiner)
                assert costs is not None
                fisher = {key: mean.float() for key, mean in costs.read(step.index).items()}
                tensors, chosen = refiner.block(step, fisher)
                lambdas = {name: KEEP if value is None else value for name, value in chosen.items()}
                step.leave()
                del fisher
                self.refined.write(step.index, tensors, notes={"lambdas": lambdas})
            self.reporter.advance("refine", step.index + 1, len(self.blocks))
            if all(self.refined.finished(block) for block in range(step.index, len(self.blocks))):
                break

    def _divergences(self) -> tuple[float, float]:
        """How far the checkpoint and the refined one are from the dense model on text that no fit has seen."""
        refined = Skeleton(
            self.checkpoint,
            self.dense.device,
            self.dense.dtype,
            edit=lambda index, block: self._load(refined, index),
            beside=self.dense,
            for_experts=self.resources.for_experts,
        )
        self.reporter.advance("compare", 0, 1)
        before, after = divergences([self.dense, self.compressed, refined], self.held_out)
        self.reporter.advance("compare", 1, 1)
        return before, after

    def _load(self, skeleton: Skeleton, index: int) -> None:
        """Put a refined block's tensors into the block in memory."""
        by_module: dict[str, dict[str, Tensor]] = {}
        for name, lazy in self.refined.lazily(index).items():
            if skeleton.lends(name):
                skeleton.lend(name, lazy.read)
                continue
            tensor, (path, leaf) = lazy.read(), self._split(skeleton.model, name)
            by_module.setdefault(path, {})[leaf] = tensor.to(
                skeleton.device, skeleton.dtype if tensor.is_floating_point() else None
            )
        for path, state in by_module.items():
            skeleton.model.get_submodule(path).load_state_dict(state, strict=False, assign=True)

    def _split(self, model: nn.Module, name: str) -> tuple[str, str]:
        """Part the name of a tensor where its target's module ends."""
        path = next(t.module for t in self.dense.resolved.targets if name.startswith(f"{t.module}."))
        return path, name.removeprefix(f"{path}.")

    def _write(self, draft: Path, taken: bool, said: Mapping[str, Any]) -> Manifest:
        plan = self.compressed.blueprint
        fitted: dict[int, Mapping[str, Lazy]] = {}

        def tensor(block: int, name: str) -> Tensor:
            if taken and block >= 0:
                if block not in fitted:
                    fitted.clear()
                    fitted[block] = self.refined.lazily(block)
                if name in fitted[block]:
                    return fitted[block][name].read()
            return plan.read(name)

        report = rewrite(
            self.checkpoint,
            draft,
            tensor,
            dtype=str(self.checkpoint.dtype).removeprefix("torch."),
            shard_bytes=self.config.shard_bytes,
            report=lambda report: {**report, "refine": dict(said)},
            advance=lambda done, total: self.reporter.advance("write", done, total),
        )
        facts = {name: value for name, value in said.items() if name != "lambdas"}
        outputs = files_in(draft)
        return commit(draft, self.identity, outputs, report | {"refine": facts}, environment(self.config.device))


def _shape(skeleton: Skeleton) -> Sequence[tuple[str, tuple[int, int]]]:
    return [(target.name, target.shape) for target in skeleton.resolved.targets]
