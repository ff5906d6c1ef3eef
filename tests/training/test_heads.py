"""Losses that heads of all kinds are trained by: those of transformers, and divergences from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch
from lowrank_compress.training.loss import from_teacher, from_text, mean_loss
from lowrank_compress.training.trainer import joined
from tests.calibration import test_head_losses as heads
from tests.calibration import test_several as several

CPU = torch.device("cpu")


def apart(batches: list[Batch]) -> list[Batch]:
    """One sequence in each batch, without padding; a pair stays one."""
    found = []
    for batch in batches:
        if batch.paired:
            found.append(batch)
            continue
        for row in range(len(batch.ids)):
            labels = None if batch.labels is None else batch.labels[row][None]
            found.append(Batch(batch.ids[row][None], labels=labels, outputs=batch.outputs))
    return found


def two(head: str, place: Path) -> tuple[Any, Any, list[Batch], Any]:
    """A model, another one, batches with labels, and the task."""
    if head in heads.HEADS:
        path, model = heads.written(head, place)
        skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
        batches = heads.batches_for(head, skeleton, place)
    else:
        path, model = several.written(head, place)
        count = model.config.num_labels
        labels = [[float(row % (each + 2) == 0) for each in range(count)] for row in range(len(several.TEXTS))]
        batches = several.batches_for(path, several.table(place, labels))
        skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    other = type(model).from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "1." in name and parameter.ndim == 2:
                parameter.mul_(0.7)
    return model, other, batches, skeleton.task


ALL = [*heads.HEADS, *several.HEADS]


@pytest.mark.parametrize("head", ALL)
def test_losses_against_labels_are_those_of_transformers(head: str, tmp_path: Path) -> None:
    model, _, batches, task = two(head, tmp_path)
    found = mean_loss(from_text(model, task), joined(apart(batches), 2))
    with torch.no_grad():
        if task == "scores" and head in several.HEADS:
            errors = [several.outputs(model, batch) - batch.labels for batch in batches]
            assert found == pytest.approx(float(torch.cat(errors).square().mean()) / 2, rel=1e-12)
            return
        parts = [(heads if head in heads.HEADS else several).own_loss(model, batch) for batch in batches]
    assert found == pytest.approx(float(sum(loss for loss, _ in parts)) / sum(terms for _, terms in parts), rel=1e-9)


def slow(model: Any, batch: Batch, task: str) -> list[Tensor]:
    """Outputs of a sequence by itself, each a distribution of classes, or the logits of labels or scores."""
    rows = [ids if batch.mask is None else ids[batch.mask[row].bool()] for row, ids in enumerate(batch.ids)]
    found = []
    for row, ids in enumerate(rows):
        made = model(input_ids=ids[None])
        if task == "answers":
            found += [made.start_logits[0], made.end_logits[0]]
        elif task in ("tokens", "masked"):
            assert batch.labels is not None
            found += list(made.logits[0][batch.labels[row] != IGNORED])
        else:
            found.append(made.logits[0])
    return found


@pytest.mark.parametrize("head", ALL)
def test_a_teacher_needs_no_labels(head: str, tmp_path: Path) -> None:
    student, teacher, batches, task = two(head, tmp_path)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for wanted, found in zip(slow(teacher, batch, task), slow(student, batch, task), strict=True):
                if task in ("scores", "labels"):
                    p, q = wanted.sigmoid(), found.sigmoid()
                    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
                    each = (wanted - found).square() / 2 if task == "scores" else each
                    total, count = total + float(each.sum()), count + len(each)
                else:
                    p, q = wanted.softmax(0), found.softmax(0)
                    total, count = total + float((p * (p / q).log()).sum()), count + 1
    loss = from_teacher(student, teacher, task)
    assert total / count > 1e-7
    assert mean_loss(loss, joined(apart(batches), 2)) == pytest.approx(total / count, rel=1e-7)
    if task not in ("tokens", "masked"):
        bare = [Batch(batch.ids, batch.mask, outputs=batch.outputs, paired=batch.paired) for batch in batches]
        assert mean_loss(loss, joined(apart(bare), 2)) == pytest.approx(total / count, rel=1e-7)


def test_words_without_labels_are_learnt_at_all_tokens(tmp_path: Path) -> None:
    student, teacher, batches, task = two("BertForTokenClassification", tmp_path)
    ids = batches[0].ids
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.softmax(-1) for model in (teacher, student))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert mean_loss(from_teacher(student, teacher, task), [Batch(ids)]) == pytest.approx(expected, rel=1e-7)
