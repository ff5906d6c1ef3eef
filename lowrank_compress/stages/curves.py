"""Curves of target groups: what may be chosen of each, what it stores, and what is predicted to be lost by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lowrank_compress.allocation.choice import Choices
from lowrank_compress.allocation.curve import Curve, make_curve
from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.calibration.statistics import INFLUENCE
from lowrank_compress.config import ScoreConfig
from lowrank_compress.methods.units import Unit, dense_elements, ranking


def choices_of(unit: Unit, config: ScoreConfig) -> Choices:
    """What may be chosen, in the storage that is asked for."""
    return unit.choices(ranking(unit, config.storage), config.round_to)


def lossless_curve(unit: Unit, config: ScoreConfig) -> Curve:
    """What each choice stores, where nobody asks what it loses."""
    choices = choices_of(unit, config)
    return make_curve(unit.name, dense_elements(unit), choices, np.zeros(len(choices)), block=unit.block)


def read_curves(
    config: ScoreConfig,
    units: Sequence[Unit],
    bases: BlockFiles,
    spectra: BlockFiles | None = None,
    *,
    on_sample: bool = False,
) -> dict[str, Curve]:
    """Make the curve of every unit from the decompositions that were kept, by the unit's name.

    Parameters
    ----------
    config
        Which choices there are.
    units
        Those of all blocks.
    bases
        Their decompositions.
    spectra
        Singular values of the weights themselves, where the allocator looks at them.
    on_sample
        Losses are those on the text that the fits were made on, not those on other text where these are known.
    """
    nats = all(unit.nats for unit in units)
    curves = {}
    for block in sorted({unit.block for unit in units}):
        tensors = bases.read(block)
        singular = {} if spectra is None else spectra.read(block)
        influence = float(tensors[INFLUENCE]) if INFLUENCE in tensors else None
        for unit in (unit for unit in units if unit.block == block):
            spectrum = singular.get(f"{unit.name}/singular_values")
            choices = choices_of(unit, config)
            losses = predicted_losses(unit, tensors, choices, nats, on_sample=on_sample)
            curves[unit.name] = make_curve(
                unit.name,
                dense_elements(unit),
                choices.where(slice(len(losses))),
                losses,
                spectrum=None if spectrum is None else spectrum.numpy(),
                block=block,
                influence=influence,
            )
    return curves


def predicted_losses(
    unit: Unit, basis: Mapping[str, Tensor], choices: Choices, nats: bool, *, on_sample: bool = False
) -> np.ndarray:
    """Predicted loss of the first choices of a unit, float64: nats per token, or a share of the unit's own total."""
    losses = unit.losses(basis, choices, on_sample=on_sample)
    if nats:
        return losses / 2
    total = unit.total(basis, on_sample=on_sample)
    return losses / total if total > 0 else np.zeros_like(losses)
