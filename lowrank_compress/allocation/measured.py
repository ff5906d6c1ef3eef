"""Curves whose losses are corrected by what was measured at a few points of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lowrank_compress.allocation.curve import Curve

SHARES = (0.75, 0.5, 0.3, 0.12)
"""Stored shares of the dense elements at which losses are measured."""
MOST = 20.0
"""No loss is corrected by more than this factor either way: what is smaller is lost in the noise of the measurement."""


def point_at(curve: Curve, share: float) -> int:
    """Return the index of the largest point that stores at most a share of the dense elements, or of the smallest."""
    return max(int(np.searchsorted(curve.stored, share * curve.dense, side="right")) - 1, 0)


def correction(measured: float, predicted: float) -> float:
    """What to multiply a predicted loss with, for it to be the measured one: from 1 / `MOST` to `MOST`.

    1 where nothing is predicted to be lost, or what was measured is not a number.
    """
    if predicted <= 0 or np.isnan(measured):
        return 1.0
    return float(np.clip(measured / predicted, 1 / MOST, MOST))


def corrected(curve: Curve, corrections: Mapping[float, float]) -> Curve:
    """Multiply a curve's losses with corrections that are known at some stored shares.

    Between two of these the logarithm of the correction is linear in the share, beyond the outermost it is constant.
    Where the product would rise with what is stored, the larger loss stands for the smaller stored count, too.

    Parameters
    ----------
    curve
        The predicted losses.
    corrections
        Stored share of the dense elements -> correction (`correction`); none leave the curve as it is.
    """
    if not corrections:
        return curve
    shares = np.array(sorted(corrections))
    logarithms = np.log([corrections[share] for share in shares])
    loss = curve.loss * np.exp(np.interp(curve.stored / curve.dense, shares, logarithms))
    return replace(curve, loss=np.maximum.accumulate(loss[::-1])[::-1])
