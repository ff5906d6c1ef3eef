"""Train a compressed checkpoint for a short time, with the dense model as its teacher or on text of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lowrank_compress.artifacts.directories import recover, replacing
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.manifest import Key, Manifest, commit, committed, listed
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.sources import PAPERS_DATA
from lowrank_compress.config import MANY, CalibrationSet
from lowrank_compress.errors import CheckpointError, InputError
from lowrank_compress.model.blueprint import Blueprint, blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.recipe import Recipe
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.identity import checkpoint_id, source_id
from lowrank_compress.stages.plan import MICRO_BATCH_TOKENS
from lowrank_compress.stages.report import REPORT
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.rewrite import rewrite
from lowrank_compress.stages.run import require_alone
from lowrank_compress.stages.samples import calibration_batches, source_of
from lowrank_compress.stages.stage import Given
from lowrank_compress.training.loss import Loss, from_teacher, from_text, mean_loss
from lowrank_compress.training.recovery import Asked, Course, train
from lowrank_compress.training.student import Student, Train
from lowrank_compress.training.trainer import Data, joined

VERSION = 1
STEPS, SEQ_LEN = 200, 512
# Of the text: sequences that are never trained on, but for what they are one eighth at most.
HELD_OUT = 16


class RecoverConfig(CalibrationSet):
    """What the trained checkpoint depends on.

    Attributes
    ----------
    towards
        "dense": the dense model's predictions; "text": the tokens of the text, or labels of examples, themselves.
    steps, seconds
        How long: a number of steps, or about so many seconds, from whose first the number is found.
    batch
        Sequences a step.
    lr
        The highest learning rate; None for one that is found by trial.
    train
        What is trained (`student.Student`).
    device
        Where.
    """

    towards: Literal["dense", "text"] = "dense"
    samples: int = Field(default=MANY, ge=1, le=MANY)
    steps: int | None = Field(default=None, ge=1, le=MANY)
    seconds: float | None = Field(default=None, gt=0, le=MANY)
    batch: int = Field(default=8, ge=1, le=MANY)
    lr: float | None = Field(default=None, gt=0)
    train: Train = "all"
    device: str = "cpu"
    shard_bytes: int = 1_000_000_000

    @model_validator(mode="after")
    def _how_long(self) -> RecoverConfig:
        if self.steps is not None and self.seconds is not None:
            raise ValueError("steps and seconds are both given; expected one of them")
        return self


def options_of(data: Mapping[str, Any], recipe: Recipe | None, device: str) -> dict[str, Any]:
    """Decide what a config says of data and device.

    Parameters
    ----------
    data
        What was asked for: source, text_column, label_column, seq_len, seed; None for what was not.
    recipe
        Of the run whose checkpoint is trained; None for a checkpoint that is none's. Its columns belong to its text.
    device
        Where to compute.

    Raises
    ------
    InputError
        No text is named.
    """
    given = {name: value for name, value in data.items() if value is not None}
    if recipe is not None:
        own = {name: getattr(recipe, name) for name in ("seq_len", "seed")}
        if "source" not in given:
            columns = {name: getattr(recipe, name) for name in ("text_column", "label_column")}
            own |= {"source": recipe.calibration or PAPERS_DATA, **columns}
        given = {name: value for name, value in own.items() if value is not None} | given
    if "source" not in given:
        raise InputError("Training needs a text: name it with --calibration (the dense model teaches) or --text.")
    length = given.setdefault("seq_len", SEQ_LEN)
    return given | {"device": device, "micro_batch": max(1, MICRO_BATCH_TOKENS[torch.device(device).type] // length)}


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


def key(config: RecoverConfig, inputs: Given) -> Key:
    """Everything that the trained checkpoint and its report depend on; a text counts by its content."""
    found = {"checkpoint": checkpoint_id(inputs.checkpoint), "text": source_id(source_of(config))}
    if config.towards == "dense":
        found["dense"] = checkpoint_id(_teacher(inputs))
    if (report := inputs.checkpoint.path / REPORT).exists():
        found["report"] = sha256(report)
    return Key("recover", VERSION, config.model_dump(mode="json", exclude={"source"}), found)


def _teacher(inputs: Given) -> Checkpoint:
    if inputs.dense is None:
        raise InputError(
            f"{inputs.checkpoint.path} does not say what it was compressed from: name the dense model with --dense, or "
            "train on text of your own with --text."
        )
    return inputs.dense


def run(
    config: RecoverConfig,
    inputs: Given,
    out_dir: Path,
    reporter: Reporter | None = None,
    *,
    resources: Resources = Resources(),
    overwrite: bool = False,
) -> Manifest:
    """Train.

    Parameters
    ----------
    config, inputs
        How, and what.
    out_dir
        The directory of the new checkpoint, which appears whole or not at all. While it is made, the state of the
        training is in ``work/`` beside it.
    reporter
        Told about progress and warnings.
    resources
        Its processes are all called with the same; each computes a share of every step.
    overwrite
        Replace another checkpoint in `out_dir`.

    Raises
    ------
    LrcError
        The checkpoint is not compressed by this package, the text or the dense model cannot be used, or another result
        is in `out_dir`.
    """
    reporter, workers = reporter or Silent(), resources.workers
    if inputs.checkpoint.quantization is None:
        raise CheckpointError(
            f"{inputs.checkpoint.path} is not compressed by this program; there is nothing to recover. Compress it "
            "first with `lrc compress`."
        )
    identity = key(config, inputs)
    workers.once(lambda: recover(out_dir, listed))
    if (found := workers.once(lambda: committed(out_dir, identity, overwrite=overwrite))) is not None:
        require_alone(out_dir, found)
        return found
    plan = blueprint(inputs.checkpoint)
    plan.check_ties()
    work = BlockFiles(out_dir.parent / "work", identity.id, "recover")
    tensors, report = _trained(config, inputs, plan, _Shelf(work, workers.is_first), reporter, resources)

    def write() -> Manifest:
        with replacing(out_dir, listed) as draft:
            found = rewrite(
                inputs.checkpoint,
                draft,
                lambda _, name: tensors[name] if name in tensors else plan.read(name),
                dtype=str(inputs.checkpoint.dtype).removeprefix("torch."),
                shard_bytes=config.shard_bytes,
                report=lambda before: {**before, "recover": report},
                advance=lambda done, total: reporter.advance("write", done, total),
            )
            outputs = [path.name for path in draft.iterdir()]
            made = commit(draft, identity, outputs, found | {"recover": report}, environment(config.device))
        work.remove([0])
        return made

    return workers.once(write)


def _trained(
    config: RecoverConfig,
    inputs: Given,
    plan: Blueprint,
    shelf: _Shelf,
    reporter: Reporter,
    resources: Resources,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors that training has changed, none if nothing came out better, and what to say of it."""
    workers, device = resources.workers, torch.device(config.device)
    data, held = _data(config, inputs.checkpoint, plan)
    model = _loaded(inputs.checkpoint, plan, device)
    loss: Loss = from_text(model)
    if config.towards == "dense":
        loss = from_teacher(model, _loaded(dense := _teacher(inputs), blueprint(dense), device))
    student = Student(model, (inputs.checkpoint.quantization or {})["modules"], plan.resolved.blocks, config.train)
    asked = Asked(config.steps or (None if config.seconds else STEPS), config.seconds, config.lr)
    course = train(student.learning, loss, data, held, asked, shelf, workers=workers, advance=reporter.advance)
    tensors = student.finish(inputs.checkpoint.dtype)
    before, after = course.before, mean_loss(loss, held, workers)
    if not after < before or course.best_step == 0:
        reporter.warn(
            f"Training found nothing better: the held-out loss was {before:.6g}, and {after:.6g} at its best. The "
            "weights stay as they were. More text, or a smaller --lr, may help."
        )
        tensors, after = {}, before
    return tensors, _report(config, course, after)


def _report(config: RecoverConfig, course: Course, after: float) -> dict[str, Any]:
    return {
        "towards": config.towards,
        "trained": config.train,
        "steps": course.done,
        "lr": course.lr,
        "tried": course.tried,
        "best_step": course.best_step,
        "loss_before": course.before,
        "loss_after": after,
    }


def _data(config: RecoverConfig, checkpoint: Checkpoint, plan: Blueprint) -> tuple[Data, list[Batch]]:
    """Make what is trained on, and what is held out: the last of the shuffled sequences."""
    alone = CalibrationSet.of(config, micro_batch=1)
    items = calibration_batches(alone, checkpoint, plan.task)
    count = min(HELD_OUT, len(items) // 8)
    if count == 0:
        raise InputError(
            f"The text makes {len(items)} sequences of --seq-len {config.seq_len}; training needs 8 at least, as some "
            "are held out. Pass more text, or a smaller --seq-len."
        )
    return Data(items[:-count], config.batch, config.micro_batch, config.seed), joined(
        items[-count:], config.micro_batch
    )


def _loaded(checkpoint: Checkpoint, plan: Blueprint, device: torch.device) -> PreTrainedModel:
    """Load a whole model in float32, without dropout, and nothing of it to be trained."""
    auto = AutoModelForCausalLM if plan.task == "lm" else AutoModelForSequenceClassification
    model: Any = auto.from_pretrained(
        checkpoint.path, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code, use_cache=False
    )
    return model.to(device).eval().requires_grad_(False)
