"""What is done to a checkpoint to recover it: blocks by themselves, then the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.labelled import needs
from lowrank_compress.calibration.shares import most
from lowrank_compress.errors import InputError, UnsupportedError
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.embedding import embedding_of
from lowrank_compress.model.tasks import AUTO, NEED_EXAMPLES
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.blockwise import Blocks
from lowrank_compress.stages.reading import has_examples
from lowrank_compress.stages.recoverconfig import RecoverConfig
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.samples import batches_by_text, has_own, parts_of, sources_of
from lowrank_compress.stages.stage import Given
from lowrank_compress.training.blockwise import LR
from lowrank_compress.training.loss import Loss, from_embedding, from_teacher, from_text, mean_loss
from lowrank_compress.training.recovery import Asked, Course, train
from lowrank_compress.training.student import Student
from lowrank_compress.training.trainer import Data, joined

STEPS = 200
# Of the text: sequences that are never trained on, but for what they are one eighth at most.
HELD_OUT = 16


@dataclass(frozen=True)
class _Shelf:
    """Keeps the state of a training in a file; the first of several processes writes it, all read it."""

    files: BlockFiles
    first: bool

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read what was saved last."""
        return (self.files.read(0), self.files.notes(0)) if self.files.finished(0) else None

    def save(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write instead of what was saved before."""
        if self.first:
            self.files.write(0, tensors, notes)


def teacher_of(inputs: Given) -> Checkpoint:
    """Return the dense model.

    Raises
    ------
    InputError
        It is not known.
    """
    if inputs.dense is None:
        raise InputError(
            f"{inputs.checkpoint.path} does not say what it was compressed from: name the dense model with --dense, or "
            "train on text of your own with --text."
        )
    return inputs.dense


class Training:
    """All that is done to a checkpoint: blocks by themselves, then the whole; what has changed of it, in the end."""

    def __init__(
        self,
        config: RecoverConfig,
        inputs: Given,
        plan: Blueprint,
        work: Path,
        id: str,
        reporter: Reporter,
        resources: Resources,
    ) -> None:
        self.config, self.inputs, self.plan, self.reporter = config, inputs, plan, reporter
        self.workers, self.device = resources.workers, torch.device(config.device)
        self._state, self._files = BlockFiles(work, id, "recover"), BlockFiles(work, id, "reconstructed")
        self._blocks: Blocks | None = None
        self._changed: dict[str, Tensor] = {}

    def make(self) -> dict[str, Any]:
        """Train, and return what to say of it."""
        config = self.config
        data, held = _data(config, self.inputs, self.plan)
        said: dict[str, Any] = {"towards": config.towards, "trained": config.train}
        if config.block is not None:
            blocks = Blocks(teacher_of(self.inputs), self.inputs.checkpoint, self.device, self._files, self.workers)
            before, after = blocks.make(data, joined(held, data.micro), config.block, LR, config.train, self.reporter)
            said["blocks"] = {"steps": config.block, "loss_before": before, "loss_after": after}
            if after < before:
                self._blocks = blocks
        if config.steps != 0:
            course, after = self._whole(data, data.together(held))
            said |= {"steps": course.done, "lr": course.lr, "tried": course.tried, "best_step": course.best_step}
            said |= {"loss_before": course.before, "loss_after": min(after, course.before)}
        if self._blocks is None and not self._changed:
            self.reporter.warn(
                "Training found nothing that is better on what is held out of the text. The weights stay as they were. "
                "More text, or a smaller --lr, may help."
            )
        return said

    def _whole(self, data: Data, held: Sequence[Batch]) -> tuple[Course, float]:
        """Train the whole model; take what has come of it if that is better than what was."""
        config, checkpoint = self.config, self.inputs.checkpoint
        model = _loaded(checkpoint, self.plan, self.device)
        if self._blocks is not None:
            model.load_state_dict(self._blocks.tensors(), strict=False)
        task = self.plan.task
        loss: Loss = from_text(model, task)
        if config.towards == "dense":
            teacher = _loaded(dense := teacher_of(self.inputs), blueprint(dense), self.device)
            embeds = task == "embedding"
            loss = from_embedding(model, teacher, embedding_of(dense)) if embeds else from_teacher(model, teacher, task)
        entries = (checkpoint.quantization or {})["modules"]
        student = Student(model, entries, self.plan.resolved.blocks, config.train, config.lora, config.seed)
        asked = Asked(config.steps or (None if config.seconds else STEPS), config.seconds, config.lr)
        shelf, advance = _Shelf(self._state, self.workers.is_first), self.reporter.advance
        course = train(student.learning, loss, data, held, asked, shelf, workers=self.workers, advance=advance)
        tensors = student.finish(checkpoint.dtype)
        after = mean_loss(loss, held, self.workers)
        if course.best_step > 0 and after < course.before:
            self._changed = tensors
        return course, after

    def tensor(self, block: int, name: str) -> Tensor:
        """Return a tensor of the new checkpoint, of a block or of what is outside (-1)."""
        if name in self._changed:
            return self._changed[name]
        changed = {} if self._blocks is None or block < 0 else self._blocks.of_block(block)
        return changed[name] if name in changed else self.plan.read(name)

    def clear(self) -> None:
        """Remove what was kept meanwhile."""
        self._state.remove([0])
        self._files.remove(range(len(self.plan.resolved.blocks)))


def _data(config: RecoverConfig, inputs: Given, plan: Blueprint) -> tuple[Data, list[Batch]]:
    """Make what is trained on, and what is held out: the last of the shuffled sequences, one in each batch.

    Of several texts as much is taken as is in proportion to their weights.
    """
    if plan.task == "embedding" and config.towards == "text":
        raise UnsupportedError(
            f"{inputs.checkpoint.path} has no head that could be trained on a text of one's own. Name the text with "
            "--calibration: then the dense model's embeddings are what it is trained towards."
        )
    if plan.task in NEED_EXAMPLES and not all(map(has_examples, sources_of(config))):
        raise InputError(
            f"A {type(plan.model).__name__} is trained on examples, and not on running text. Name a table with the "
            f"column of its texts, for instance --calibration TABLE.tsv --text-column text; no labels are needed."
        )
    alone = config.model_copy(update={"micro_batch": 1})
    by_text = batches_by_text(alone, teacher_of(inputs) if has_own(config) else inputs.checkpoint, plan.task)
    counts = most([part.weight for part in parts_of(config)], [len(own) for own in by_text])
    items = [item for own, count in zip(by_text, counts, strict=True) for item in own[:count]]
    if config.towards == "text" and plan.task in NEED_EXAMPLES and any(item.labels is None for item in items):
        raise InputError(
            f"--text trains a {type(plan.model).__name__} on labels, and the data have none. Pass {needs(plan.task)}; "
            "or name them with --calibration, with which the dense model's outputs are what it is trained towards."
        )
    if not isinstance(config.source, str):  # what is held out is of all texts
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(config.seed)).tolist()
        items = [items[number] for number in order]
    count = min(HELD_OUT, len(items) // 8)
    if count == 0:
        raise InputError(
            f"The text makes {len(items)} sequences of --seq-len {config.seq_len}; training needs 8 at least, as some "
            "are held out. Pass more text, or a smaller --seq-len."
        )
    return Data(items[:-count], config.batch, config.micro_batch, config.seed, _padding(plan)), items[-count:]


def _padding(plan: Blueprint) -> int | None:
    """Name a token to fill up texts of unlike lengths with, where a mask is all that this needs: where they are pooled.

    Some families count positions of what is not this token.
    """
    if plan.task != "embedding":
        return None
    named = getattr(plan.model.config, "pad_token_id", None)
    return named if isinstance(named, int) and named >= 0 else 0


def _loaded(checkpoint: Checkpoint, plan: Blueprint, device: torch.device) -> PreTrainedModel:
    """Load a whole model in float32, without dropout, and nothing of it to be trained."""
    model: Any = AUTO[plan.task].from_pretrained(
        checkpoint.path, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code, use_cache=False
    )
    return model.to(device).eval().requires_grad_(False)
