"""Ranks from one threshold on normalised singular values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_compress.allocation.curve import Curve
from lowrank_compress.allocation.search import loosest
from lowrank_compress.errors import InputError


def allocate(curves: Sequence[Curve], limit: int) -> np.ndarray:
    """Choose the ranks r = #{i: σ̂_i ≥ τ} with σ̂ = (σ − σ_min) / (σ_max − σ_min), one τ for all matrices.

    σ is the weight's own spectrum, whatever the method that factorizes it. A matrix whose rank would not be cheaper
    than dense stays dense. τ is the smallest one under which Σ stored stays within the limit; every matrix keeps at
    least its cheapest point. A flat spectrum (σ_max = σ_min) counts as σ̂ = 1: it has nothing that could be left out.

    WeLore ("From GaLore to WeLore", 2024), where τ is searched for a target *rank*; here it is for stored elements.

    Returns
    -------
    numpy.ndarray
        (len(curves),) int64: the index of the chosen point of each curve.

    Raises
    ------
    InputError
        If a curve has no spectrum, or even the smallest ranks exceed the limit.
    """
    spectra = [_normalised(curve) for curve in curves]

    def choose(threshold: float) -> np.ndarray:
        choice = np.zeros(len(curves), dtype=np.int64)
        for position, (curve, spectrum) in enumerate(zip(curves, spectra, strict=True)):
            rank = len(spectrum) - np.searchsorted(spectrum, threshold, side="left")
            low_rank = curve.ranks
            if not len(low_rank) or rank > low_rank[-1]:
                choice[position] = len(curve) - 1
            else:
                choice[position] = max(np.searchsorted(low_rank, rank, side="right") - 1, 0)
        return choice

    return loosest(curves, limit, np.unique(np.concatenate([*spectra, []]))[::-1], choose)


def _normalised(curve: Curve) -> np.ndarray:
    """Return σ̂ in ascending order."""
    if curve.spectrum is None:
        raise InputError(
            f"The allocator 'welore' needs the singular values of {curve.name}, but its curve has none. Score again "
            "with this allocator."
        )
    spectrum = np.sort(np.asarray(curve.spectrum, dtype=np.float64))
    width = spectrum[-1] - spectrum[0]
    return (spectrum - spectrum[0]) / width if width > 0 else np.ones_like(spectrum)
