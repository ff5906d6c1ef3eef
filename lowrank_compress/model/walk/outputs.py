"""What the outputs of a head mean: a class, labels that apply, or scores; their losses and distances."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_compress.model.tasks import Task
from lowrank_compress.model.walk.batch import IGNORED, Batch

Meaning = Literal["class", "labels", "scores"]


def meaning_of(task: Task, batch: Batch) -> Meaning:
    """Say what outputs mean: scores of pairs are two classes, of which the first is right."""
    if task == "labels":
        return "labels"
    return "scores" if task == "scores" and not batch.paired else "class"


def summed_loss(meaning: Meaning, outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum the losses of outputs against what they should be.

    Of classes it is the cross-entropy in nats over all targets that are not `IGNORED`; of labels −log σ(z) where one
    applies and −log σ(−z) where not, for each; of scores half the squared error of each.

    Parameters
    ----------
    outputs
        (…, classes), or (sequences, outputs).
    targets
        (…) int64, or (sequences, outputs).
    """
    targets = targets.to(outputs.device)
    if meaning == "class":
        return nn.functional.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED
        )
    if meaning == "labels":
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="sum")
    return (outputs - targets.to(outputs)).square().sum() / 2


def summed_divergence(meaning: Meaning, wanted: Tensor, found: Tensor) -> Tensor:
    """Sum how far outputs are from others, of one shape: KL(wanted ‖ found) of classes and of each label in nats.

    Of scores it is half the squared change, the divergence of normal distributions of variance 1 about them.
    """
    wanted = wanted.to(found.device)
    if meaning == "class":
        return nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
    if meaning == "labels":
        says, other = nn.functional.logsigmoid, wanted.sigmoid()
        return (other * (says(wanted) - says(found)) + (1 - other) * (says(-wanted) - says(-found))).sum()
    return (found - wanted).square().sum() / 2


def drawn_labels(outputs: Tensor, first: int) -> Tensor:
    """Draw labels from what a model says of each, (sequences, labels) of 1 and 0, by the number of each sequence.

    Parameters
    ----------
    outputs
        Logits (sequences, labels).
    first
        Of which the first sequence's number is; it and a seed decide.
    """
    shares = outputs.detach().sigmoid().cpu()
    chances = [
        torch.rand(shares.shape[1], generator=torch.Generator().manual_seed((first + number) % 2**63))
        for number in range(len(shares))
    ]
    return (torch.stack(chances) < shares).double()


def random_signs(shape: torch.Size, first: int) -> Tensor:
    """Draw signs for the outputs of each sequence, (sequences, …) of 1 and −1, by the number of each."""
    signs = [
        torch.randint(2, shape[1:], generator=torch.Generator().manual_seed(first + number)) * 2 - 1
        for number in range(shape[0])
    ]
    return torch.stack(signs)
