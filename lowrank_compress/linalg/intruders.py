"""Directions of a fine-tuned matrix that its base does not have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_compress.errors import InputError


@dataclass(frozen=True)
class Intruders:
    """How the leading left singular vectors of a tuned matrix lie among those of its base.

    Attributes
    ----------
    cosines
        For each of the leading ones, its largest absolute cosine to any of the base's.
    indices
        Those below the threshold.
    """

    cosines: tuple[float, ...]
    indices: tuple[int, ...]


def intruder_dimensions(tuned: Tensor, base: Tensor, *, top: int = 10, epsilon: float = 0.5) -> Intruders:
    """Find the intruder dimensions of a tuned matrix.

    A leading left singular vector uⱼ of W' is one if max_i |⟨uⱼ, uᵢ⟩| < ε over all left singular vectors uᵢ of W
    (R. Shuttleworth et al., LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228).

    Parameters
    ----------
    tuned, base
        W' and W, (out, in).
    top
        How many leading vectors of W' are looked at.
    epsilon
        ε.

    Raises
    ------
    InputError
        The two have different shapes.
    """
    if tuned.shape != base.shape:
        raise InputError(f"Expected two matrices of one shape, got {tuple(tuned.shape)} and {tuple(base.shape)}.")
    left = torch.linalg.svd(tuned.double(), full_matrices=False)[0][:, :top]
    known = torch.linalg.svd(base.double(), full_matrices=False)[0]
    cosines = (left.T @ known).abs().amax(1).tolist()
    return Intruders(tuple(cosines), tuple(number for number, cosine in enumerate(cosines) if cosine < epsilon))
