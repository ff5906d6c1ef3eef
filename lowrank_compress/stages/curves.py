"""Curves of target groups: what may be chosen of each, what it stores, and what is predicted to be lost by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from torch import Tensor

from lowrank_compress.allocation.choice import Choices
from lowrank_compress.allocation.curve import Curve, make_curve
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.statistics import INFLUENCE
from lowrank_compress.config import ScoreConfig
from lowrank_compress.methods.groups import TargetGroup, dense_elements, ranking


def choices_of(group: TargetGroup, config: ScoreConfig) -> Choices:
    """What may be chosen, in the storage that is asked for."""
    return group.choices(ranking(group, config.storage), config.round_to)


def cost_of_dense(group: TargetGroup) -> int:
    """What a curve counts of a group that stays as it is: elements, or what the cache keeps of a token."""
    return group.cached or dense_elements(group)


def lossless_curve(group: TargetGroup, config: ScoreConfig) -> Curve:
    """What each choice stores, where nobody asks what it loses."""
    choices = choices_of(group, config)
    return make_curve(group.name, cost_of_dense(group), choices, np.zeros(len(choices)), block=group.block)


def read_curves(
    config: ScoreConfig,
    groups: Sequence[TargetGroup],
    bases: BlockFiles,
    spectra: BlockFiles | None = None,
    *,
    yardsticks: Mapping[str, Sequence[TargetGroup]] = {},
    on_sample: bool = False,
) -> dict[str, Curve]:
    """Make the curve of every group from the decompositions that were kept, by the group's name.

    Parameters
    ----------
    config
        Which choices there are.
    groups
        Those of all blocks.
    bases
        Their decompositions.
    spectra
        Singular values of the weights themselves, where the allocator looks at them.
    yardsticks
        Of groups that are one of several alternatives, those of the first (`candidates.yardsticks`).
    on_sample
        Losses are those on the text that the fits were made on, not those on other text where these are known.
    """
    nats = all(group.nats for group in groups if not group.cached)
    curves = {}
    for block in sorted({group.block for group in groups}):
        tensors = bases.read(block)
        singular = {} if spectra is None else spectra.read(block)
        influence = float(tensors[INFLUENCE]) if INFLUENCE in tensors else None
        for group in (group for group in groups if group.block == block):
            spectrum = singular.get(f"{group.name}/singular_values")
            choices = choices_of(group, config)
            losses = predicted_losses(
                group, tensors, choices, nats or group.cached > 0, yardsticks.get(group.name, ()), on_sample=on_sample
            )
            curves[group.name] = make_curve(
                group.name,
                cost_of_dense(group),
                choices.where(slice(len(losses))),
                losses,
                spectrum=None if spectrum is None else spectrum.numpy(),
                block=block,
                influence=influence,
            )
    return curves


def predicted_losses(
    group: TargetGroup,
    basis: Mapping[str, Tensor],
    choices: Choices,
    nats: bool,
    yardsticks: Sequence[TargetGroup] = (),
    *,
    on_sample: bool = False,
) -> np.ndarray:
    """Predicted loss of the first choices of a group, float64: nats per token, or a share of a total.

    That is the group's own; of one among alternatives the mean of its `yardsticks` (`candidates.yardsticks`).
    """
    losses = group.losses(basis, choices, on_sample=on_sample)
    if nats:
        return losses / 2
    total = fmean(each.total(basis, on_sample=on_sample) for each in yardsticks or (group,))
    return losses / total if total > 0 else np.zeros_like(losses)
